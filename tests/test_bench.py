"""The benchmark command: what it prints and writes, not how fast anything is."""

import json

import jax
import numpy as np
import pytest

from glm_jax.bench.__main__ import main
from glm_jax.bench.machine import PeakMemory, resident
from glm_jax.bench.measure import spread
from glm_jax.bench.ours import active_bytes
from glm_jax.checkpoint import load
from glm_jax.errors import GlmError
from glm_jax.params import leaves

EXPERTS = [("moe", name) for name in ("gate", "up", "down")]
QUICK = ["--repeats", "2", "--batch", "1,2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_jax.bench.measure._PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("glm_jax.bench.machine._READ_BYTES", 1 << 20)


def test_decode_prints_a_table_and_writes_the_report(tmp_path, capsys):
    files = ["--json", str(tmp_path / "d.json"), "--markdown", str(tmp_path / "d.md")]
    assert main(["decode", *QUICK, "--context", "5", "--tokens", "3", *files]) == 0
    report = json.loads((tmp_path / "d.json").read_text())
    assert (report["kind"], report["context"], report["tokens"], report["peer"]) == ("decode", 5, 3, None)
    assert set(report["machine"]) >= {
        "device",
        "cpu",
        "cores",
        "load_average",
        "versions",
        "commit",
        "read_bytes_per_s",
    }
    assert [result["batch"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        rate = result["glm_jax"]["tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert len(rate["all"]) == 2
    assert report["results"][0]["weights_read_bytes_per_s"] > 0
    assert "weights_read_bytes_per_s" not in report["results"][1]  # nobody counted the experts that two rows read
    table = (tmp_path / "d.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 1 | 5 |" in table


def test_prefill_has_a_case_per_batch_and_length(tmp_path, capsys):
    assert main(["prefill", *QUICK, "--lengths", "4,9", "--json", str(tmp_path / "p.json")]) == 0
    results = json.loads((tmp_path / "p.json").read_text())["results"]
    assert [(result["batch"], result["length"]) for result in results] == [(1, 4), (1, 9), (2, 4), (2, 9)]
    assert "| 2 | 9 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["decode", "--batch", "1,x"], "--batch"),
        (["prefill", "--lengths", "0"], "--lengths"),
        (["decode", "--tokens", "0"], "--tokens"),
        (["decode", "--json", "nowhere/report.json"], "nowhere"),
        (["decode", "--model", "synthetic:flash", "--peer", "transformers"], "convert"),
        (["decode", "--quantize", "int3"], "there are int4, int4-small, int4-experts, int8"),
        (["decode", "--peer", "unquantised"], "--quantize, which is not given"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(args, message):
    with pytest.raises(GlmError, match=message):
        main(args)


def test_a_missing_peer_is_said_in_words(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GlmError, match="needs torch"):
        main(["decode", "--peer", "transformers"])


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_bytes_read_are_those_of_the_chosen_experts(quantize):
    cfg, params, _ = load("tiny", dtype="float32", quantize=quantize)
    held = dict(leaves(params))
    experts = sum(held[path].nbytes for path in held if path[-1] in ("gate", "up", "down") and path[-2] == "moe")
    mtp = sum(weight.nbytes for path, weight in held.items() if path[0] == "mtp")
    of_mtp = sum(held[path].nbytes for path in held if path[-2:] in EXPERTS and path[0] == "mtp")
    total = sum(weight.nbytes for weight in held.values())
    idle = (experts - of_mtp) * (1 - cfg.num_experts_per_tok / cfg.n_routed_experts)
    row = held["embed",].nbytes / cfg.vocab_size
    assert active_bytes(cfg, params) == round(total - mtp - idle - held["embed",].nbytes + row)


def test_a_quantised_model_beside_itself_unquantised(tmp_path):
    files = ["--json", str(tmp_path / "q.json")]
    args = ["--context", "5", "--tokens", "3", "--quantize", "int4", "--peer", "unquantised"]
    assert main(["decode", *QUICK, *args, *files]) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert (report["quantize"], report["peer"]) == ("int4", "unquantised")
    loaded = report["loaded"]
    assert loaded["glm_jax"]["weight_bytes"] < 0.26 * loaded["unquantised"]["weight_bytes"]
    assert set(report["results"][0]) >= {"glm_jax", "unquantised", "ratio"}


@pytest.mark.skipif(resident() is None, reason="needs /proc")
def test_peak_memory_is_above_the_start():
    with PeakMemory() as memory:
        held = np.ones(64 << 20, np.uint8)
        jax.block_until_ready(jax.numpy.asarray(held[:1]))
    assert memory.peak is not None
    assert memory.peak >= held.nbytes * 0.9
