"""Imports point down only, and importing costs nothing but time."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import glm_jax

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("glm_jax", "convert", "pallas_kernels")

# A module's level is that of the longest prefix of its name found here. ARCHITECTURE.md draws the same table.
LEVELS = {
    "glm_jax": 7,  # the facade: looks names up lazily, and nothing below may import it
    **{f"glm_jax.{name}": 6 for name in ("generate", "plan", "bench", "batch", "serve", "cli", "terminal")},
    **{f"glm_jax.{name}": 5 for name in ("llm", "decoding", "answers", "companions", "requests", "engine", "aot")},
    **{
        f"glm_jax.{name}": 4
        for name in ("steps", "checkpoint", "memory", "compile_cache", "rows", "prompts", "completion")
    },
    "convert": 4,
    **{f"convert.{name}": 6 for name in ("verify", "compare", "quality")},
    **{f"glm_jax.{name}": 3 for name in ("model", "mtp", "sampling", "text", "kernel_choice")},
    "glm_jax.ops": 2,
    **{
        f"glm_jax.{name}": 1
        for name in ("cache", "config", "config_checks", "errors", "params", "quant", "sharding", "storage", "tiling")
    },
    "pallas_kernels": 0,
}
NO_JAX = ("glm_jax.engine.request", "glm_jax.engine.blocks", "glm_jax.engine.scheduler")


def module_files() -> dict[str, Path]:
    """Dotted module name -> file, for every product module in the repository."""
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Absolute names that a module imports anywhere, inside functions and for type checking included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            origin = base if node.level else (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def owner(name: str) -> str | None:
    """The product module that an imported dotted name comes from, or None when it is foreign."""
    while name:
        if name in FILES:
            return name
        name = name.rpartition(".")[0]
    return None


def level(module: str) -> int | None:
    """The level of a product module; below the facade itself, every module must be listed."""
    name = module
    while name not in LEVELS:
        name = name.rpartition(".")[0]
        if name in ("", "glm_jax"):
            return None
    return LEVELS[name]


def import_graph() -> dict[str, set[str]]:
    return {
        module: {found for name in imported_names(module, path) if (found := owner(name)) and found != module}
        for module, path in FILES.items()
    }


GRAPH = import_graph()


def test_every_module_has_a_level():
    unlisted = [module for module in FILES if level(module) is None]
    assert not unlisted, f"give these a level in LEVELS and in ARCHITECTURE.md: {unlisted}"


def test_imports_point_down():
    upward = [
        f"{module} (L{level(module)}) imports {target} (L{level(target)})"
        for module, targets in GRAPH.items()
        for target in sorted(targets)
        if (level(target) or 0) > (level(module) or 0)
    ]
    assert not upward, "\n".join(upward)


def test_no_import_cycles():
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]), pytrace=False)


def imports_by_name(module: str) -> bool:
    return any(name == "importlib" or name.endswith(".import_module") for name in imported_names(module, FILES[module]))


def typed_names(module: str) -> dict[str, str]:
    """Public name -> module, as a lazy package tells type checkers."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


@pytest.mark.parametrize("module", [module for module in FILES if imports_by_name(module)])
def test_lazy_packages_say_what_they_import(module):
    """A string given to import_module would escape the tests above, were it not also imported for type checkers."""
    assert FILES[module].name == "__init__.py", "only packages look their public names up lazily"
    package = import_module(module)
    homes = {name: home if "." in home else f"{module}.{home}" for name, home in package._HOMES.items()}
    assert typed_names(module) == {**homes, **dict.fromkeys(getattr(package, "_MODULES", ()), module)}
    assert set(package.__all__) == set(typed_names(module))


def reachable(start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += GRAPH[module]
    return seen


def test_the_scheduler_side_of_the_engine_is_plain_python():
    for module in sorted(set(NO_JAX) & set(FILES)):
        users = [m for m in reachable(module) if any(n.split(".")[0] == "jax" for n in imported_names(m, FILES[m]))]
        assert not users, f"{module} reaches jax through {users}"


# Runs in a fresh interpreter. Blames an event on us when, going out from it, a frame of ours comes before one of the
# import system: then our module's own top level (or something it called) did it, not a library's or the loader's.
WATCH_IMPORTS = """
import json, os, runpy, sys
root, modules = sys.argv[1], sys.argv[2:]
WATCHED = ("open", "os.putenv", "os.unsetenv", "os.listdir", "os.system", "socket.connect", "socket.getaddrinfo",
           "subprocess.Popen")
found = []

def ours(frame):
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith("<frozen importlib"):
            return None
        if file.startswith(root) and os.sep + "." not in file[len(root) - 1:]:
            return f"{file[len(root):]}:{frame.f_lineno}"
        frame = frame.f_back
    return None

def watch(event, arguments):
    if event in WATCHED and (place := ours(sys._getframe(1))):
        found.append(f"{place} {event} {arguments[:1]}")

sys.addaudithook(watch)
for module in modules:
    __import__(module)
print(json.dumps({"found": found, "modules": sorted(sys.modules)}))
"""


def watch_imports(*modules: str) -> dict[str, list[str]]:
    # A platform that does not exist: the first question about devices raises.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WATCH_IMPORTS, f"{ROOT}{os.sep}", *modules],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.smoke
def test_importing_anything_touches_no_device_sets_nothing_reads_nothing():
    # Triton reads the source of what it is to compile; nothing imports such a module before it launches a kernel.
    kernels = [module for module in FILES if module.rpartition(".")[2] in ("triton", "_tile_dot", "_dequantize")]
    importable = [module for module in FILES if not module.endswith("__main__") and module not in kernels]
    watched = watch_imports(*importable)
    assert watched["found"] == []
    assert not {*kernels, "triton"} & set(watched["modules"])


def test_the_watch_sees_what_it_should(tmp_path):
    """The test above proves nothing unless its watch catches each offense."""
    (tmp_path / "data.txt").write_text("x")
    offenses = {
        "reads": "from pathlib import Path\nPath(__file__).with_name('data.txt').read_text()",
        "sets": "import os\nos.environ['GLM_JAX_SET_AT_IMPORT'] = '1'",
        "starts": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
    }
    for name, code in offenses.items():
        (tmp_path / f"{name}.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "-c", WATCH_IMPORTS, f"{tmp_path}{os.sep}", name],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["found"], name
    (tmp_path / "touches.py").write_text("import jax\njax.devices()")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", "import touches"], env=environment, capture_output=True, check=False)
    assert done.returncode != 0


def test_importing_the_package_imports_nothing_heavy():
    loaded = watch_imports("glm_jax")["modules"]
    assert not {"jax", "numpy", "flax", "tokenizers"} & set(loaded)
    assert [m for m in loaded if m.startswith("glm_jax")] == ["glm_jax"]


PUBLIC = ["LLM", "SamplingParams", "GLM", "Config", "LatentCache", "Rules", "GlmError", "text"]


def test_public_names_are_these():
    assert glm_jax.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(glm_jax))
    assert glm_jax.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nonsense"):
        glm_jax.nonsense  # noqa: B018


@pytest.mark.smoke
@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_documented(name):
    home = glm_jax._HOMES.get(name, f"glm_jax.{name}")
    value = getattr(glm_jax, name)
    assert value.__doc__
    assert value is (getattr(import_module(home), name) if name in glm_jax._HOMES else import_module(home))


def test_packages_carry_the_typing_marker():
    assert (ROOT / "glm_jax" / "py.typed").is_file()
