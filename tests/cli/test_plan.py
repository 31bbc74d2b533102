"""``python -m glm_jax.plan``: its output, what it reads, and what it refuses."""

import json

import jax
import pytest

from glm_jax.checkpoint.array_record import ArrayRecord
from glm_jax.checkpoint.folder.layout import checkpoint_layout
from glm_jax.checkpoint.folder.manifest import Manifest
from glm_jax.checkpoint.round_trip import RoundTripInfo
from glm_jax.checkpoint.sources.inspect import load_config_and_storage
from glm_jax.cli.common import BAD_INPUT, run_and_exit
from glm_jax.config import Config
from glm_jax.errors import CheckpointError, ConfigError
from glm_jax.memory import devices, known_gpus, plan_memory
from glm_jax.plan.__main__ import main
from glm_jax.plan.compiled_loop import compiled_summary

FLASH = "synthetic:flash"
SMALL = Config.flash(layers=3).replace(
    vocab_size=512, hidden_size=64, n_routed_experts=8, eos_token_ids=(), pad_token_id=None
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets the variables that the command would set."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture
def run(capsys):
    def run(*args: str) -> tuple[str, str]:
        assert main(args) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def refused(capsys):
    def refused(*args: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run_and_exit(lambda: main(args))
        captured = capsys.readouterr()
        assert caught.value.code == BAD_INPUT
        assert captured.out == ""
        return captured.err

    return refused


def write_config(folder, cfg=SMALL, **extra):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg.to_hf() | extra))
    return str(folder)


@pytest.mark.smoke
def test_json_of_the_real_model(run):
    out, err = run("--model", FLASH, "--gpu", "h100", "--context", "32768", "--json")
    record = json.loads(out)
    assert err == ""
    assert out.count("\n") == 1
    expected = {
        "model": FLASH,
        "on": "1 x h100",
        "fits": True,
        "parameters": 29_943_393_920,
        "parameters_on_disk": 31_221_488_576,
        "weight_bytes": 59_886_793_728,
        "mtp_bytes": 1_287_412_480,
        "cache_bytes_per_token": 54_144,
        "context": 32_768,
        "max_context": 202_752,
        "device_bytes": int(0.95 * known_gpus()["h100"].memory_bytes),
    }
    assert {name: record[name] for name in expected} == expected
    # The rest of the memory holds this many caches of that length.
    assert record["max_sequences"] == 9
    assert 370 < record["bound_tokens_per_s"] < 380


def test_plan_for_an_absent_gpu_touches_no_device(run, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("asked for devices"))
    monkeypatch.setattr(jax, "local_devices", lambda *_: pytest.fail("asked for devices"))
    assert json.loads(run("--model", FLASH, "--gpu", "b200x4", "--json")[0])["devices"] == 4


def test_tables_of_a_model_that_fits(run):
    out, err = run("--model", FLASH, "--gpu", "rtxpro6000", "--context", "8192", "--sequences", "8")
    assert err == ""
    for text in ("29,943,393,920", "59,886,793,728", "1,287,412,480", "54,144 bytes per token", "202,752 tokens"):
        assert text in out
    assert "31,221,488,576 parameters" in out
    lines = out.splitlines()
    assert "fits" in lines
    assert any(line.startswith("decoding: at most ") and "a bound, not a measurement" in line for line in lines)


def test_model_that_does_not_fit_is_reported_with_exit_code_0(run):
    out, _ = run("--model", FLASH, "--gpu", "rtx6000-ada", "--context", "32768")
    assert "does not fit: 61.17 GB weights + 1.77 GB cache (1 sequence of 32,768 tokens at 54,144 bytes) + " in out
    assert "what would fit: 2 such devices, with mesh=2" in out
    record = json.loads(run("--model", FLASH, "--gpu", "rtx6000-ada", "--context", "32768", "--json")[0])
    assert (record["fits"], record["max_context"], record["max_sequences"]) == (False, 0, 0)


def test_several_gpus_show_the_bytes_on_each(run):
    out, _ = run("--model", FLASH, "--gpu", "rtx6000-adax2", "--context", "4096")
    assert "on each device" in out
    assert "2 x rtx6000-ada" in out
    assert "fits" in out.splitlines()


def test_options_reach_the_plan(run):
    def record(*args: str) -> dict:
        return json.loads(run("--model", FLASH, "--gpu", "b200", "--context", "1000", "--json", *args)[0])

    plain = record()
    assert record("--dtype", "float32")["weight_bytes"] == 4 * plain["parameters"]
    assert record("--dtype", "float32")["cache_bytes_per_token"] == 2 * 54_144
    assert record("--cache-dtype", "float32")["cache_bytes_per_token"] == 2 * 54_144
    assert record("--cache-dtype", "float32")["weight_bytes"] == plain["weight_bytes"]
    for kind in ("int8", "fp8"):
        narrow = record("--cache-dtype", kind)
        assert (narrow["cache_dtype"], narrow["cache_bytes_per_token"]) == (kind, 27_448)
        assert narrow["device_needs"]["cache"] == 1000 * 27_448
        assert narrow["weight_bytes"] == plain["weight_bytes"]
        assert plain["decode_bytes"] - narrow["decode_bytes"] == 1000 * (54_144 - 27_448)
    assert record("--sequences", "3")["device_needs"]["cache"] == 3 * 1000 * 54_144
    bare = record("--no-mtp")
    assert plain["device_needs"]["weights"] - bare["device_needs"]["weights"] == plain["mtp_bytes"] == bare["mtp_bytes"]
    assert record("--memory-fraction", "0.5")["device_bytes"] == known_gpus()["b200"].memory_bytes // 2


def test_plan_for_the_local_device(run, monkeypatch):
    monkeypatch.setattr(devices, "available_host_memory", lambda: 10**9)
    out, err = run("--json")
    record = json.loads(out)
    assert (record["model"], record["on"], record["device_bytes"]) == ("tiny", "1 x cpu", 10**9)
    assert record["fits"]
    assert record["bound_tokens_per_s"] is None
    assert "--cache-dtype float32" in err
    out, err = run("--json", "--mesh", "4", "--cache-dtype", "float32")
    assert (json.loads(out)["devices"], json.loads(out)["device_bytes"]) == (4, 10**9 // 4)
    assert err == ""


def test_folder_needs_only_its_config(tmp_path, run):
    folder = write_config(tmp_path / "model")
    record = json.loads(run("--model", folder, "--gpu", "l40s", "--json")[0])
    assert record["parameters"] == plan_memory(SMALL, device_bytes=0).parameters
    assert load_config_and_storage(folder)[0] == SMALL


def test_config_of_a_converted_folder_comes_from_its_manifest(tmp_path):
    cfg = SMALL.replace(mtp_own_embeddings=True)
    records = {
        name: {leaf.name: ArrayRecord(leaf.shape, leaf.spec.dtype or "bfloat16", "0" * 64) for leaf in members}
        for name, members in checkpoint_layout(cfg).items()
    }
    manifest = Manifest(
        cfg=cfg, dtype="bfloat16", original=RoundTripInfo(), source_fingerprint="test", array_records=records
    )
    folder = write_config(tmp_path / "converted")
    (tmp_path / "converted" / "manifest.json").write_text(manifest.to_json())
    assert load_config_and_storage(folder)[0] == cfg


def test_hub_id_downloads_only_the_config(tmp_path, monkeypatch):
    write_config(tmp_path)
    requests = []

    def download(repo: str, filename: str) -> str:
        requests.append((repo, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_config_and_storage("someone/Model-1.0")[0] == SMALL
    assert requests == [("someone/Model-1.0", "config.json")]


def test_unreachable_hub_is_an_error(monkeypatch):
    import huggingface_hub.errors as errors

    def unreachable(*_: str) -> str:
        raise errors.LocalEntryNotFoundError("cannot find it\nmore of that")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match=r"no folder no/such, .*\(cannot find it\): .* or give a folder's path"):
        load_config_and_storage("no/such")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no folder"),
        ("not here", "no folder not here, and it is not a hub id"),
        ("synthetic:flash?layers=0", "layers must be 1 to 1000"),
        ("synthetic:nothing", "no synthetic model 'nothing'"),
    ],
)
def test_invalid_sources_are_refused(source, message):
    with pytest.raises(CheckpointError, match=message):
        load_config_and_storage(source)


def test_single_files_are_refused(tmp_path):
    for name, message in (("model.bin", "pickle"), ("model.safetensors", "or the folder")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=message):
            load_config_and_storage(str(tmp_path / name))


def test_unsupported_configs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_config_and_storage(str(tmp_path))
    with pytest.raises(ConfigError, match="model_type"):
        load_config_and_storage(write_config(tmp_path, model_type="llama"))


def test_quantized_config_without_weights_is_planned_as_unquantized(tmp_path, caplog):
    assert load_config_and_storage(write_config(tmp_path, quantization_config={"quant_method": "awq"}))[0] == SMALL
    assert "only the weight files say how" in caplog.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "h101"], "no card 'h101' (did you mean h100?)"),
        (["--gpu", "h100x3"], "20 attention heads do not divide over 3 devices (possible: [1, 2, 4, 5, 10, 20])"),
        (["--gpu", "h100", "--context", "202753"], "context must be 1 to 202,752"),
        (["--gpu", "h100", "--sequences", "0"], "sequences must be at least 1"),
        (["--gpu", "h100", "--mesh", "4"], "write --gpu h100x4"),
        (["--gpu", "h100", "--memory-fraction", "1.5"], "--memory-fraction must be in (0, 1]"),
        (["--gpu", "h100", "--compile", "--dtype", "float32"], "compute in bfloat16: leave --dtype out"),
        (["--mesh", "9"], "mesh=9 asked for, but 8 cpu device(s) are there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(refused, args, message):
    err = refused("--model", FLASH, *args)
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err


@pytest.mark.parametrize("args", [["--dtype", "int4"], ["--context", "long"], ["--nonsense"]])
def test_bad_usage_is_exit_code_2(args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2


def test_help_has_examples_and_gpus(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for text in (
        "python -m glm_jax.plan --model synthetic:flash --gpu h100",
        "--context",
        "for memory only",
        *known_gpus(),
    ):
        assert text in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "390 kernels per token in one CUDA graph for the whole loop; 17.00 GB of weights, cache and state",
        ),
        ({}, "2.0 MB of them temporaries, which fits (kernels are compiled, not run or timed)"),
        ({"fits": False}, "which does not fit"),
        ({"collectives": ["kAllReduce"] * 95}, "95 of them exchanges between devices, in one CUDA graph with the host"),
        ({"graph_pieces": 3}, "in 3 CUDA graphs"),
        ({"kernels": {"flash_kernel": 1}}, "the fused kernels of a decode step take at most 128 tokens at a time"),
    ],
)
def test_compiled_loop_is_summarized_in_a_sentence(changes, message):
    compiled = {
        "launches_per_token": 390, "graph_pieces": 1, "launches_outside_graphs": 0, "collectives": [],
        "argument_bytes": 16_998_000_000, "temp_bytes": 2_000_000, "fits": True, "kernels": {"flash_decode_kernel": 47},
    }  # fmt: skip
    assert message in compiled_summary({**compiled, **changes})
