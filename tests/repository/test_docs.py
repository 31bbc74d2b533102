"""What the documents say is so: links lead somewhere, commands parse, code runs, numbers follow from the config."""

import importlib
import json
import math
import re
import runpy
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tyro

import glm_jax
from examples import measure_quality
from glm_jax import checkpoint
from glm_jax.cache.latent import bytes_per_token
from glm_jax.checkpoint.sources.synthetic import SyntheticSpec
from glm_jax.config import Config
from glm_jax.ops.mla import is_expanded_cheaper
from glm_jax.weights import QUANT_PRESETS
from glm_jax.weights.params import ParamSpec, leaves_with_path, param_specs
from glm_jax.weights.random_init import init_params
from glm_jax.weights.storage import Storage, abstract_params, plan_storage
from tests.builders.tiny_overrides import TINY_OVERRIDES
from tests.repository.test_layers import FILES, LEVELS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "glm_jax" / "tiny"
DOCUMENTS = sorted(
    path for at in ("*.md", "docs/**/*.md", "examples/*.md", "glm_jax/tiny/*.md") for path in ROOT.glob(at)
)
README, ARCHITECTURE, QUANTIZATION, NUMERICS, KERNELS, CHECKPOINTS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "ARCHITECTURE.md",
        "docs/quantization.md",
        "docs/numerics.md",
        "docs/kernels.md",
        "docs/checkpoints.md",
    )
)
FLASH = Config.flash()


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of the table whose header begins with ``first``."""
    table = re.search(rf"(?m)^\| {re.escape(first)} ?\|.*\n\|[-: |]+\n((?:\|.*\n)+)", text)
    assert table, f"no table that begins with {first!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


# ----------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", without_code(text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken


def test_the_link_test_sees_headings():
    assert anchors("# A title: `code`\n## Two words\n```\n# none\n```\n") == {"a-title-code", "two-words"}


# -------------------------------------------------------------------------------------------- commands


def command_lines(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line and not line.startswith("#")]


PYTHON = re.compile(r"\.venv(-parity)?/bin/python -m ")
COMMANDS = [line for path in DOCUMENTS for line in command_lines(path.read_text(encoding="utf-8"))]


def parse(module: str, arguments: list[str]) -> None:
    """As the command does: by its class of options, or one for each of its own commands."""
    package = importlib.import_module(module)
    home = importlib.import_module(f"{module}.__main__") if hasattr(package, "__path__") else package
    own = {name: value for name, value in vars(home).items() if getattr(value, "__module__", "") == home.__name__}
    if parsers := [build for name, build in own.items() if re.fullmatch("build_[a-z]+_parser", name)]:
        parsers[0]().parse_args(arguments)
    elif hasattr(home, "COMMANDS"):
        tyro.extras.subcommand_cli_from_dict(home.COMMANDS, args=arguments)
    else:
        (options,) = (value for name, value in vars(home).items() if name.endswith("Options"))
        tyro.cli(options, args=arguments)


@pytest.mark.parametrize("line", [line for line in COMMANDS if PYTHON.match(line)])
def test_commands_parse(line):
    module, *arguments = shlex.split(PYTHON.sub("", line, count=1))
    parse(module, arguments)


@pytest.mark.parametrize("command", [["glm_jax.generate"], ["glm_jax.bench", "decode"], ["pallas_kernels.bench"]])
def test_the_command_test_refuses_what_is_not_there(command):
    with pytest.raises(SystemExit):
        parse(command[0], [*command[1:], "--no-such-flag"])


def test_make_targets_are_there():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    used = {name for path in DOCUMENTS for name in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)}
    assert {"generate", "test", "venv"} <= used <= targets


def test_every_line_of_shell_is_of_a_kind_that_is_checked():
    assert COMMANDS
    assert all(PYTHON.match(line) or line.startswith("make ") for line in COMMANDS)


def test_synthetic_models_in_documents_parse():
    named = {name for path in DOCUMENTS for name in re.findall(r"synthetic:[a-z]+[\w?=&]*", path.read_text())}
    assert named
    for name in named:
        SyntheticSpec.parse(name)


# -------------------------------------------------------------------------------------------- notebook


@pytest.fixture
def small_llm(tmp_path) -> glm_jax.LLM:
    """A model as small as they come, which speaks the miniature's tokens."""
    cfg = Config.from_hf(json.loads((TINY / "config.json").read_bytes()))
    cfg = cfg.replace(**TINY_OVERRIDES)
    checkpoint.save(tmp_path / "small", cfg, init_params(cfg, dtype=jnp.float32))
    shutil.copy(TINY / "tokenizer.json", tmp_path / "small")
    return glm_jax.LLM.load(tmp_path / "small", dtype="float32")


def test_the_notebook_lines_of_the_readme_run(small_llm, monkeypatch, tmp_path, capsys):
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 12
    monkeypatch.setattr(glm_jax.LLM, "load", lambda quantize=None: small_llm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.py").write_text(code)
    names = runpy.run_path("lines.py")
    assert names["logits"].dtype == "float32"
    assert all(value.shape[0] == len(names["logits"]) for value in names["trace"].values())
    assert (tmp_path / "my-model" / "manifest.json").is_file()
    assert capsys.readouterr().out


def test_the_readme_names_the_size_of_the_miniature():
    cfg = Config.from_hf(json.loads((TINY / "config.json").read_bytes()))
    assert f"{parameters(param_specs(cfg)) / 1e6:.1f} M parameters" in " ".join(README.split())


# --------------------------------------------------------------------------------------------- numbers


def parameters(tree: dict[str, Any]) -> int:
    return sum(spec.size for _, spec in leaves_with_path(tree))


def nbytes(tree: dict[str, Any], dtype: str) -> int:
    def width(spec: ParamSpec) -> int:
        return jnp.dtype(spec.dtype or dtype).itemsize

    return sum(spec.size * width(spec) for _, spec in leaves_with_path(tree))


def test_the_memory_table_follows_from_the_config():
    specs = param_specs(FLASH)
    layer = specs.pop("mtp")
    table = {name: numbers for name, *numbers in rows(README, "")}
    dtypes = ("bfloat16", "float32")
    expected = {
        f"weights, {parameters(specs):,} parameters": [f"{nbytes(specs, d) / 1e9:.2f} GB" for d in dtypes],
        f"prediction layer, {parameters(layer):,} parameters": [f"{nbytes(layer, d) / 1e9:.2f} GB" for d in dtypes],
        "latent cache, one token": [f"{bytes_per_token(FLASH, d):,} bytes" for d in dtypes],
    }
    for length, words in ((32_768, ""), (FLASH.max_position_embeddings, " (the longest context)")):
        name = f"latent cache, {length:,} tokens{words}"
        expected[name] = [f"{length * bytes_per_token(FLASH, d) / 1e9:.2f} GB" for d in dtypes]
    assert table == expected


def test_the_costs_of_attention_follow_from_the_config():
    heads = FLASH.qk_head_dim + FLASH.v_head_dim
    projection = (FLASH.qk_nope_head_dim + FLASH.v_head_dim) * FLASH.kv_lora_rank
    absorbed = FLASH.cache_width + FLASH.kv_lora_rank
    crossover = projection / (absorbed - heads)
    for number in (heads, projection, absorbed, absorbed - heads, int(crossover), FLASH.num_attention_heads * heads):
        assert re.search(rf"\b{number:,}\b", NUMERICS + ARCHITECTURE), number
    slots = 1 << 30
    assert not is_expanded_cheaper(FLASH, int(crossover), slots)
    assert is_expanded_cheaper(FLASH, int(crossover) + 1, slots)


def test_the_sizes_of_the_presets_follow_from_the_config():
    table = {name.strip("`"): cells[-2:] for name, *cells in rows(QUANTIZATION, "preset")}
    expected = {}
    for name, rules in {"none": None, **QUANT_PRESETS}.items():
        storage = plan_storage(FLASH, rules)[0] if rules else Storage()
        held = abstract_params(FLASH, "bfloat16", storage=storage)
        held.pop("mtp")
        total = sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(held))
        count = parameters({name: spec for name, spec in param_specs(FLASH).items() if name != "mtp"})
        expected[name] = [f"{total / 1e9:.2f} GB", f"{8 * total / count:.2f}"]
    assert table == expected


def test_the_tables_of_quality_are_those_of_the_results(tmp_path):
    results = json.loads((ROOT / "docs" / "quantization" / "results.json").read_text(encoding="utf-8"))
    (tmp_path / "page.md").write_text(QUANTIZATION, encoding="utf-8")
    measure_quality.fill_page(tmp_path / "page.md", measure_quality.markdown_tables(results))
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == QUANTIZATION
    assert "| int4/mse |" in QUANTIZATION


GLOSSARY = {
    "D": FLASH.hidden_size,
    "N": FLASH.num_attention_heads,
    "R": FLASH.kv_lora_rank,
    "P": FLASH.qk_rope_head_dim,
    "Q": FLASH.q_lora_rank,
    "E": FLASH.n_routed_experts,
    "X": FLASH.num_experts_per_tok,
    "F": FLASH.moe_intermediate_size,
    "I": FLASH.intermediate_size,
    "V": FLASH.vocab_size,
    "L": FLASH.num_hidden_layers,
}


def test_the_glossary_has_every_letter_and_its_size():
    table = {letter: size for letter, _, size in rows(ARCHITECTURE, "letter")}
    assert {letter: table[letter] for letter in GLOSSARY} == {k: f"{v:,}" for k, v in GLOSSARY.items()}
    assert table["H"] == f"{FLASH.qk_nope_head_dim}, {FLASH.v_head_dim}"
    assert set(table) - set(GLOSSARY) == {"B", "T", "S", "H"}


# ---------------------------------------------------------------------------------------- architecture


def test_the_layer_table_is_that_of_the_layer_test():
    table = {
        name: int(level.removeprefix("L"))
        for level, modules, _ in rows(ARCHITECTURE, "level")
        for name in re.findall(r"`([\w.]+)`", modules)
    }
    wrong = {name: level for name, level in table.items() if LEVELS.get(name) != level}
    assert not wrong, f"LEVELS in tests/repository/test_layers.py says otherwise: {wrong}"
    missing = [name for name in LEVELS if name in FILES and name not in table]
    assert not missing, f"give these a place in the layer table of ARCHITECTURE.md: {missing}"


def test_the_parameter_tree_names_every_parameter():
    (tree,) = (block for block in blocks(ARCHITECTURE, "") if block.startswith("embed "))
    drawn = set(re.findall(r"\w+", tree))
    for cfg in (FLASH, FLASH.replace(q_lora_rank=None)):
        assert {name for path, _ in leaves_with_path(param_specs(cfg)) for name in path} <= drawn


def resolve(name: str) -> object:
    """The module or attribute behind a dotted name that is written without ``glm_jax.``, or with it."""
    first, *rest = name.removeprefix("glm_jax.").split(".")
    home = "convert" if first == "convert" else f"glm_jax.{first}"
    found: Any = getattr(glm_jax, first) if first in glm_jax.__all__ else importlib.import_module(home)
    for part in rest:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part)
    return found


OUR_FIRST_NAMES = {name.split(".")[1] for name in FILES if name.startswith("glm_jax.")} | set(glm_jax.__all__)
NAMES = sorted(
    {
        name
        for text in (README, ARCHITECTURE, NUMERICS, KERNELS, CHECKPOINTS)
        for name in re.findall(r"`(?:glm_jax\.)?([A-Za-z_]+(?:\.[A-Za-z_]+)+)\b[^`]*`", without_code(text))
        if name.split(".")[0] in OUR_FIRST_NAMES and not name.endswith((".json", ".py"))
    }
)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_text_exist(name):
    assert resolve(name) is not None


def test_names_are_found_in_the_text():
    expected = {"ops.mla.is_expanded_cheaper", "ops.experts.select_expert_method", "weights.params.param_specs"}
    assert expected | {"LLM.load"} <= set(NAMES)
    with pytest.raises((AttributeError, ImportError)):
        resolve("ops.experts.no_such_name")
    files = set(re.findall(r"`([\w-]+/[\w./-]+\.(?:py|md|ipynb))`", README + ARCHITECTURE + NUMERICS + KERNELS))
    assert files
    assert not [name for name in files if not (ROOT / name).is_file()]
