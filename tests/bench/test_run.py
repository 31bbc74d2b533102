"""The benchmark commands: what they print and write, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glm_jax.bench import run
from glm_jax.bench.__main__ import main
from glm_jax.bench.cases import parse_size_option
from glm_jax.bench.run import validate_bench_options
from glm_jax.bench.short import short_benchmarks
from glm_jax.errors import GlmError
from pallas_kernels.report_format import format_size

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--repeats", "2", "--batch", "1,2"]


def test_decode_prints_a_table_and_writes_the_report(tmp_path, capsys):
    files = ["--json", str(tmp_path / "d.json"), "--markdown", str(tmp_path / "d.md"), "--out", str(tmp_path)]
    assert main(["decode", *QUICK, "--context", "5,9,8k", "--tokens", "3", *files]) == 0
    text = (tmp_path / "d.json").read_text()
    report = json.loads(text)
    assert (report["kind"], report["dtype"], report["tokens"], report["peers"]) == ("decode", "float32", 3, [])
    assert report["cache_holds"] == "random rows"
    expected_keys = {"device", "cpu", "cores", "load_average", "python", "versions", "commit", "bandwidth"}
    assert set(report["machine"]) == expected_keys
    cases = [(result["batch"], result["context"]) for result in report["results"]]
    assert cases == [(batch, context) for batch in (1, 2) for context in (5, 9, 8192)]
    for result in report["results"]:
        if result["context"] == 8192:
            assert result["skipped"] == "longer than the model's 4,096 tokens"
            continue
        own, read = result["glm_jax"], result["read"]
        one, all_rows, ms = (
            own[name] for name in
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
        own = result["glm_jax"]
        work = result["batch"] * result["length"]
        assert own["tokens_per_s_of_all_rows"]["max"] == pytest.approx(1e3 * work / own["ms_for_all_prompts"]["min"])
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
        (["decode", "--peer", "unquantized"], "needs --quantize"),
        (["decode", "--peer", "reference"], "which do not run here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(args, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("glm_jax.bench.run.GlmJaxBackend", None)
    with pytest.raises(GlmError, match=message):
        main(args)


def test_missing_torch_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GlmError, match="needs torch"):
        main(["decode", "--peer", "transformers"])


def test_peer_may_be_given_several_times(monkeypatch):
    seen = []
    monkeypatch.setattr("glm_jax.bench.run.measure_and_print", lambda options: seen.append(options) or 0)
    assert main(["decode", "--peer", "reference", "--peer", "transformers", "--context", "1k,128k"]) == 0
    assert seen[0].peer == ("reference", "transformers")
    assert parse_size_option(seen[0].context, "--context") == (1024, 131_072)


@pytest.mark.parametrize("peer", [["--peer", "unquantised"], ["--peer=unquantised"]])
def test_earlier_spelling_of_a_peer_is_accepted(monkeypatch, peer):
    seen = []
    monkeypatch.setattr("glm_jax.bench.run.measure_and_print", lambda options: seen.append(options) or 0)
    assert main(["decode", "--model", "unquantised", *peer, "--peer", "reference"]) == 0
    assert (seen[0].model, seen[0].peer) == ("unquantised", ("unquantized", "reference"))


@pytest.mark.parametrize("command", [["--help"], ["decode", "--help"], ["prefill", "--help"], ["project", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


def test_sizes_are_parsed_and_formatted():
    assert parse_size_option(" 1,8K , 200k", "--x") == (1, 8192, 204_800)
    assert [format_size(n) for n in (1, 1000, 1024, 8192, 131_072)] == ["1", "1,000", "1k", "8k", "128k"]
    for wrong in ("", "0", "-1", "1.5k", "k", "1,,2", "1kk"):
        with pytest.raises(GlmError, match="--x must be positive numbers"):
            parse_size_option(wrong, "--x")


def test_failed_case_sets_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(run, "run_cases", lambda *_: iter([{"batch": 1, "context": 8, "failed": "no reason"}]))
    assert main(["decode", "--context", "8"]) == 1
    out, err = capsys.readouterr()
    assert "* batch 1, context 8: failed, no reason" in out
    assert "batch 1, 8 tokens: failed: no reason" in err


def test_quantized_model_with_its_unquantized_peer(tmp_path):
    files = ["--json", str(tmp_path / "q.json")]
    args = ["--context", "5", "--tokens", "3", "--quantize", "int4", "--peer", "unquantized"]
    assert main(["decode", *QUICK, *args, *files]) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert (report["quantize"], report["peers"]) == ("int4", ["unquantized"])
    loaded = report["loaded"]
    assert loaded["glm_jax"]["weight_bytes"] < 0.26 * loaded["unquantized"]["weight_bytes"]
    assert set(report["results"][0]) >= {"glm_jax", "unquantized", "ratio", "same_tokens"}


def test_options_of_the_short_benchmarks_are_valid(tmp_path):
    for options in short_benchmarks(tmp_path).values():
        validate_bench_options(options)


def test_short_benchmarks_do_not_import_tyro():
    code = "import sys; sys.modules['tyro'] = None; import glm_jax.bench.short"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
