"""The benchmark command: what it prints and writes, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from glm_jax.bench import run
from glm_jax.bench.__main__ import main
from glm_jax.bench.glm_jax_backend import GlmJaxBackend, active_weight_bytes
from glm_jax.bench.hardware import PeakMemoryMonitor, resident_bytes
from glm_jax.bench.options import DecodeOptions, parse_size_option, validate_bench_options
from glm_jax.bench.profiler import summarize_operations
from glm_jax.bench.random_weights import random_quantized_params
from glm_jax.bench.report_tables import bench_report_markdown
from glm_jax.bench.short import benchmark_sets
from glm_jax.bench.timing import decode_metrics, summarize, time_interleaved
from glm_jax.checkpoint import load
from glm_jax.config import Config
from glm_jax.errors import GlmError
from glm_jax.memory import expected_active_experts
from glm_jax.weights import QUANT_PRESETS, QuantizedTensor, TiledWeight
from glm_jax.weights.params import leaves_with_path
from glm_jax.weights.storage import quantized_bytes
from pallas_kernels import LaunchError
from pallas_kernels.report_format import format_size

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = [("moe", name) for name in ("gate", "up", "down")]
QUICK = ["--repeats", "2", "--batch", "1,2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_jax.bench.timing._PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("glm_jax.bench.hardware._READ_BYTES", 1 << 20)


def test_decode_prints_a_table_and_writes_the_report(tmp_path, capsys):
    files = ["--json", str(tmp_path / "d.json"), "--markdown", str(tmp_path / "d.md"), "--out", str(tmp_path)]
    assert main(["decode", *QUICK, "--context", "5,9,8k", "--tokens", "3", *files]) == 0
    text = (tmp_path / "d.json").read_text()
    report = json.loads(text)
    assert (report["kind"], report["dtype"], report["tokens"], report["peers"]) == ("decode", "float32", 3, [])
    assert report["cache_holds"] == "random rows"
    wanted = {"device", "cpu", "cores", "load_average", "python", "versions", "commit", "bandwidth"}
    assert set(report["machine"]) == wanted
    cases = [(result["batch"], result["context"]) for result in report["results"]]
    assert cases == [(batch, context) for batch in (1, 2) for context in (5, 9, 8192)]
    for result in report["results"]:
        if result["context"] == 8192:
            assert result["skipped"] == "longer than the model's 4,096 tokens"
            continue
        ours, read = result["glm_jax"], result["read"]
        one, all_rows, ms = (
            ours[name] for name in
            ("tokens_per_s_of_one_row", "tokens_per_s_of_all_rows", "ms_per_token_of_one_row")
        )  # fmt: skip
        assert 0 < ms["min"] <= ms["median"] <= ms["max"]
        assert len(ms["all"]) == 2
        assert all_rows["median"] == pytest.approx(result["batch"] * one["median"])
        assert read["bytes_per_s"] == pytest.approx(read["bytes_per_step"] / ms["median"] * 1e3)
        assert read["bytes_per_token"] == round(read["bytes_per_step"] / result["batch"])
        assert "bound_tokens_per_s_of_all_rows" not in read  # nobody knows the bandwidth of a CPU
        assert {"compiled", "profiled"}.isdisjoint(result)
    table = (tmp_path / "d.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 1 | 5 |" in table
    assert "| 2 | 8k | skipped |" in table
    assert (tmp_path / "cpu-decode-tiny.json").read_text() == text
    assert (tmp_path / "cpu-decode-tiny.md").read_text() == table
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cpu-decode-tiny.json", "cpu-decode-tiny.md", "d.json", "d.md"
    ]  # fmt: skip


def test_prefill_has_a_case_per_batch_and_length(tmp_path, capsys):
    assert main(["prefill", *QUICK, "--lengths", "4,9", "--json", str(tmp_path / "p.json")]) == 0
    results = json.loads((tmp_path / "p.json").read_text())["results"]
    assert [(result["batch"], result["length"]) for result in results] == [(1, 4), (1, 9), (2, 4), (2, 9)]
    for result in results:
        ours = result["glm_jax"]
        work = result["batch"] * result["length"]
        assert ours["tokens_per_s_of_all_rows"]["max"] == pytest.approx(1e3 * work / ours["ms_for_all_prompts"]["min"])
    assert "| 2 | 9 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["decode", "--batch", "1,x"], "--batch"),
        (["decode", "--context", "1m"], "--context"),
        (["prefill", "--lengths", "0"], "--lengths"),
        (["decode", "--tokens", "0"], "--tokens"),
        (["decode", "--json", "nowhere/report.json"], "nowhere"),
        (["decode", "--out", "nowhere"], "cannot write into nowhere"),
        (["decode", "--model", "synthetic:flash", "--peer", "transformers"], "convert"),
        (["decode", "--quantize", "int3"], "there are int4, int4-small, int4-experts, int8"),
        (["decode", "--peer", "unquantized"], "--quantize, which is not given"),
        (["decode", "--peer", "reference"], "which do not run here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(args, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("glm_jax.bench.run.GlmJaxBackend", None)
    with pytest.raises(GlmError, match=message):
        main(args)


def test_a_missing_peer_is_said_in_words(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GlmError, match="needs torch"):
        main(["decode", "--peer", "transformers"])


def test_several_peers_are_asked_for_one_by_one(monkeypatch):
    asked = []
    monkeypatch.setattr("glm_jax.bench.run.measure", lambda options: asked.append(options) or 0)
    assert main(["decode", "--peer", "reference", "--peer", "transformers", "--context", "1k,128k"]) == 0
    assert asked[0].peer == ("reference", "transformers")
    assert parse_size_option(asked[0].context, "--context") == (1024, 131_072)


@pytest.mark.parametrize("command", [["--help"], ["decode", "--help"], ["prefill", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


def test_lengths_are_read_and_written_as_people_do():
    assert parse_size_option(" 1,8K , 200k", "--x") == (1, 8192, 204_800)
    assert [format_size(n) for n in (1, 1000, 1024, 8192, 131_072)] == ["1", "1,000", "1k", "8k", "128k"]
    for wrong in ("", "0", "-1", "1.5k", "k", "1,,2", "1kk"):
        with pytest.raises(GlmError, match="--x must be positive numbers"):
            parse_size_option(wrong, "--x")


def test_spread():
    assert summarize([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


def test_times_are_of_one_row_and_speeds_of_one_and_of_all():
    found = decode_metrics([2.0, 4.0, 1.0], batch=8, tokens=100)
    assert found["ms_per_token_of_one_row"]["median"] == 20
    assert found["tokens_per_s_of_one_row"]["median"] == 50
    assert found["tokens_per_s_of_all_rows"]["median"] == 400


class Timed:
    """A side that says how long it takes."""

    def __init__(self, name, seconds, tokens=(1, 2)):
        self.name, self.seconds, self.tokens, self.compile_seconds = name, iter(seconds), np.asarray([tokens]), 9.0

    def __call__(self):
        return next(self.seconds), self.tokens


def test_peers_are_compared_turn_by_turn():
    sides = [Timed("glm_jax", [9, 1, 2]), Timed("a", [9, 3, 2], (1, 3)), Timed("b", [9, 4, 1])]
    seconds, compared = time_interleaved(sides, sides, repeats=2)
    assert seconds == [[1, 2], [3, 2], [4, 1]]
    assert {name: found["all"] for name, found in compared["ratio"].items()} == {"a": [3.0, 1.0], "b": [4.0, 0.5]}
    assert compared["same_tokens"] == {"a": 0.5, "b": 1.0}


def results_of(**options):
    """Cases of the miniature, without the report around them."""
    asked = DecodeOptions(repeats=1, tokens=2, **options)
    validate_bench_options(asked)
    return list(run._run_cases(asked, [GlmJaxBackend("tiny", "float32")], 1e9))


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(run, "available_device_memory", lambda device: 40_000_000)
    first, second = results_of(batch="1,64", context="256")
    assert "glm_jax" in first
    assert second["skipped"].endswith("for cache and workspace, and 40.00 MB are free")
    assert second["skipped"].startswith("needs ")


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore"), "skipped"),
        (LaunchError("no kernel"), "failed"),
        (jax.errors.JaxRuntimeError("INTERNAL: broken"), "failed"),
    ],
)
def test_a_case_that_fails_leaves_the_others(monkeypatch, error, word):
    plain = GlmJaxBackend.decode

    def decode(self, state, tokens):
        if state.cache.batch == 2:
            raise error
        return plain(self, state, tokens)

    monkeypatch.setattr(GlmJaxBackend, "decode", decode)
    results = results_of(batch="1,2,4", context="8")
    assert ["glm_jax" in result for result in results] == [True, False, True]
    assert results[1][word] == str(error).splitlines()[0]


def test_tokens_are_compared_where_the_weights_are_the_same():
    compared = {"same_tokens": {"unquantized": 0.1, "reference": 1.0}}
    asked = DecodeOptions(model="tiny")
    assert run._drop_incomparable(asked, dict(compared)) == compared
    asked = DecodeOptions(model="synthetic:flash")
    assert run._drop_incomparable(asked, {"same_tokens": dict(compared["same_tokens"])})["same_tokens"] == {
        "reference": 1.0
    }
    assert run._drop_incomparable(asked, {}) == {}


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(run, "_run_cases", lambda *_: iter([{"batch": 1, "context": 8, "failed": "no reason"}]))
    assert main(["decode", "--context", "8"]) == 1
    out, err = capsys.readouterr()
    assert "* batch 1, context 8: failed, no reason" in out
    assert "batch 1, 8 tokens: failed: no reason" in err


@pytest.mark.parametrize("cache", ["float32", "int8", "fp8"])
def test_turns_begin_at_the_same_place_and_copy_no_cache(cache):
    ours = GlmJaxBackend("tiny", "float32", cache_dtype=cache)
    state = ours.start_with_random_cache(3, 40, 6)
    assert state.cache.cache_dtype == cache
    assert (state.cache.batch_size, state.cache.capacity) == (4, 128)
    turns = [ours.decode(state, 6)[1] for _ in range(2)]
    assert turns[0].shape == (4, 6)
    assert (turns[0][:3] >= 0).all()
    assert (turns[0][3] == -1).all()  # fills the batch up
    np.testing.assert_array_equal(*turns)
    assert len({tuple(row) for row in turns[0][:3].tolist()}) > 1  # rows of the cache are not all alike


GPU_REPORT = {
    "kind": "decode", "model": "synthetic:flash", "dtype": "bfloat16", "cache_dtype": "bfloat16", "quantize": "int4",
    "kernels": True, "peers": ["reference"], "repeats": 3, "tokens": 64, "cache_holds": "random rows",
    "machine": {
        "device": "NVIDIA H200", "cpu": "a cpu", "cores": 16, "load_average": 0.5, "python": "3.12.3",
        "versions": {"jax": "0.11.2"}, "commit": None,
        "bandwidth": {"bytes_per_s": 4e12, "of": "copies, read and written"},
        "gpu": {
            "driver_version": "580", "clocks.sm": "1 MHz", "clocks.max.sm": "2 MHz", "clocks.mem": "3 MHz",
            "ecc.mode.current": "Enabled", "power.limit": "700 W",
        },
    },
    "loaded": {"glm_jax": {"seconds": 1.0, "weight_bytes": 17e9, "peak_bytes": None}},
    "results": [
        {
            "batch": 8, "context": 8192,
            "glm_jax": {**decode_metrics([0.064], 8, 64), "compile_s": 4.0},
            "reference": {**decode_metrics([0.128], 8, 64), "compile_s": 5.0},
            "ratio": {"reference": summarize([2.0])}, "same_tokens": {"reference": 0.5},
            "read": {
                "bytes_per_step": 4e9, "bytes_per_s": 4e12, "of_measured_bandwidth": 1.0, "of_bound": 0.5,
            },
            "compiled": {"launches_per_token": 390},
            "profiled": {"us": 1000.0, "operations": [{"name": "down_kernel", "count": 46.0, "us": 500.0}]},
        }
    ],
}  # fmt: skip


def test_the_tables_of_a_gpu():
    text = bench_report_markdown(GPU_REPORT)
    row = next(line for line in text.splitlines() if line.startswith("| 8 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    one = "1.000 (1.000 – 1.000)"
    assert cells == [
        "8", "8k", one, "1,000.0", "8,000.0 (8,000.0 – 8,000.0)", "~4.000", "~4,000.0", "~100%", "~50%", "390",
        "2.000 (2.000 – 2.000)", "**2.00 (2.00 – 2.00)**", "50%", "4.0",
    ]  # fmt: skip
    assert "driver 580, clocks 1 MHz of 2 MHz and memory 3 MHz, ECC Enabled" in text
    assert "| down_kernel | 46.0 | 500.0 | 50% |" in text
    assert "commit unknown" in text
    assert "as many experts as uniform routing would choose" in text
    assert run.bench_report_name(GPU_REPORT) == "nvidia-h200-decode-synthetic-flash-int4"


PROFILE = """
planes { id: 1 name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "down_kernel" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_12" } }
  event_metadata { key: 3 value { id: 3 name: "loop_add_fusion.3" } }
  lines { id: 1 name: "Stream #7(Compute)"
    events { metadata_id: 1 duration_ps: 4000000 } events { metadata_id: 1 duration_ps: 6000000 }
    events { metadata_id: 2 duration_ps: 1000000 } events { metadata_id: 3 duration_ps: 1000000 } }
  lines { id: 2 name: "XLA Ops" events { metadata_id: 1 duration_ps: 4000000 } } }
planes { id: 2 name: "/host:CPU" event_metadata { key: 1 value { id: 1 name: "x" } }
  lines { id: 1 name: "Stream #1" events { metadata_id: 1 duration_ps: 4000000 } } }
"""


def test_operations_are_those_of_the_streams_of_the_gpu():
    data = jax.profiler.ProfileData
    found = summarize_operations(data.from_serialized_xspace(data.text_proto_to_serialized_xspace(PROFILE)), steps=2)
    assert found == {
        "launches": 2.0,
        "us": 6.0,
        "operations": [
            {"name": "down_kernel", "count": 1.0, "us": 5.0},
            {"name": "loop_add_fusion", "count": 1.0, "us": 1.0},
        ],
    }
    nothing = data.text_proto_to_serialized_xspace('planes { name: "/host:CPU" }')
    assert summarize_operations(data.from_serialized_xspace(nothing), 1) is None


def small_flash():
    """Few layers and experts, narrow, of widths that tiles divide."""
    cfg = Config.flash(layers=2)
    return cfg.replace(
        vocab_size=128, hidden_size=128, num_attention_heads=2, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=32,
        v_head_dim=32, qk_rope_head_dim=32, intermediate_size=192, moe_intermediate_size=64, n_routed_experts=4,
        num_nextn_predict_layers=0, eos_token_ids=(3,), pad_token_id=3,
    )  # fmt: skip


def test_random_weights_are_the_same_in_tiles_and_not():
    cfg, rules = small_flash(), QUANT_PRESETS["int4"]  # experts in 4 bits, the rest in 8
    tiled, plain = (
        dict(leaves_with_path(random_quantized_params(cfg, rules, "float32", tiles=tiles))) for tiles in (True, False)
    )
    kinds = {True: TiledWeight, False: QuantizedTensor}
    quantized = [path for path, weight in plain.items() if isinstance(weight, QuantizedTensor)]
    assert len(quantized) > 15
    assert {type(tiled[path]) for path in quantized if path != ("embed",)} == {kinds[True]}
    for path in plain:
        one, other = np.asarray(tiled[path], np.float32), np.asarray(plain[path], np.float32)
        np.testing.assert_array_equal(one, other, err_msg="/".join(path))
        if path in quantized and one.size > 4000:
            size = 1.0 if path == ("embed",) else one.shape[-1] ** -0.5
            assert 0.9 * size < one.std() < 1.2 * size
            assert abs(one.mean()) < 0.1 * size
    held = sum(x.nbytes for weight in plain.values() for x in jax.tree.leaves(weight))
    assert held == quantized_bytes(cfg, rules, "float32")


def test_the_short_sets_are_possible(tmp_path):
    for options in benchmark_sets(tmp_path).values():
        validate_bench_options(options)


def test_the_short_sets_need_no_package_for_the_command_line():
    code = "import sys; sys.modules['tyro'] = None; import glm_jax.bench.short, glm_jax.bench.run"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_bytes_read_are_those_of_the_chosen_experts(quantize):
    cfg, params, _ = load("tiny", dtype="float32", quantize=quantize)
    held = dict(leaves_with_path(params))
    experts = sum(held[path].nbytes for path in held if path[-1] in ("gate", "up", "down") and path[-2] == "moe")
    mtp = sum(weight.nbytes for path, weight in held.items() if path[0] == "mtp")
    of_mtp = sum(held[path].nbytes for path in held if path[-2:] in EXPERTS and path[0] == "mtp")
    total = sum(weight.nbytes for weight in held.values())
    idle = (experts - of_mtp) * (1 - cfg.num_experts_per_tok / cfg.n_routed_experts)
    row = held["embed",].nbytes / cfg.vocab_size
    always = total - mtp - held["embed",].nbytes
    assert active_weight_bytes(cfg, params) == round(always - idle + row)
    idle = (experts - of_mtp) * (1 - expected_active_experts(cfg, 8) / cfg.n_routed_experts)
    assert active_weight_bytes(cfg, params, 8) == round(always - idle + 8 * row)


def test_a_quantized_model_beside_itself_unquantized(tmp_path):
    files = ["--json", str(tmp_path / "q.json")]
    args = ["--context", "5", "--tokens", "3", "--quantize", "int4", "--peer", "unquantized"]
    assert main(["decode", *QUICK, *args, *files]) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert (report["quantize"], report["peers"]) == ("int4", ["unquantized"])
    loaded = report["loaded"]
    assert loaded["glm_jax"]["weight_bytes"] < 0.26 * loaded["unquantized"]["weight_bytes"]
    assert set(report["results"][0]) >= {"glm_jax", "unquantized", "ratio", "same_tokens"}


@pytest.mark.skipif(resident_bytes() is None, reason="needs /proc")
def test_peak_memory_is_above_the_start():
    with PeakMemoryMonitor() as memory:
        held = np.ones(64 << 20, np.uint8)
        jax.block_until_ready(jax.numpy.asarray(held[:1]))
    assert memory.peak is not None
    assert memory.peak >= held.nbytes * 0.9
