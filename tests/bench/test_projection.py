"""Speeds that a report predicts for other GPUs."""

import json

import pytest

from glm_jax.bench.__main__ import main
from glm_jax.bench.projection import fit_bandwidth
from glm_jax.errors import GlmError
from glm_jax.memory import known_gpus

H200 = known_gpus()["h200"]


def report(seconds_of, contexts=(1024, 8192, 32_768), device=None, **changes):
    """Returns a decode report in which a step takes ``seconds_of(bytes)``."""
    sizes = {context: 2_900_000_000 + 54_144 * context for context in contexts}
    results = [
        {
            "batch": batch,
            "context": context,
            "read": {"bytes_per_step": nbytes},
            "glm_jax": {"ms_per_token_of_one_row": {"median": 1e3 * batch * seconds_of(nbytes)}},
        }
        for batch in (1, 8)
        for context, nbytes in sizes.items()
    ]
    skipped = {"batch": 1, "context": 131_072, "skipped": "no room"}
    settings = {"kind": "decode", "model": "synthetic:flash", "quantize": "int4", "dtype": "bfloat16"}
    machine = {"device": device or H200.device_kind}
    return {**settings, "cache_dtype": "bfloat16", "machine": machine, "results": [*results, skipped], **changes}


def test_fit_recovers_bandwidth_and_overhead():
    fit = fit_bandwidth(report(lambda nbytes: 3e-4 + nbytes / (0.8 * H200.bandwidth)))
    assert fit.bandwidth_fraction == pytest.approx(0.8)
    assert fit.overhead_seconds == pytest.approx(3e-4)
    assert fit.num_contexts == 3


def test_single_context_counts_all_time_as_reading():
    fit = fit_bandwidth(report(lambda nbytes: 2 * nbytes / H200.bandwidth, contexts=(8192,)))
    assert (fit.bandwidth_fraction, fit.overhead_seconds, fit.num_contexts) == (pytest.approx(0.5), 0.0, 1)


def test_projection_onto_the_measured_gpu_is_the_measurement(tmp_path, capsys):
    """The report has the bytes of the plan, so the projection must return the measured speeds."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report(lambda nbytes: nbytes / (0.5 * H200.bandwidth))))
    assert main(["project", "--report", str(path), "--gpu", "h200,rtx6000-ada,b200x4"]) == 0
    text = capsys.readouterr().out
    assert "Not measured." in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "card" not in line]
    cells = [[cell.strip() for cell in row] for row in rows if "---" not in row[0]]
    assert [row[0] for row in cells] == [name for name in ("h200", "rtx6000-ada", "b200x4") for _ in range(4)]
    for _, _, bound, projected in cells:
        assert int(projected.replace(",", "")) == pytest.approx(int(bound.replace(",", "")) / 2, abs=1)
    four, one = (int(next(row for row in cells if row[0] == name)[2].replace(",", "")) for name in ("b200x4", "h200"))
    assert four > 3 * one  # a quarter of the split weights each, at more bandwidth


def test_repeated_cases_are_one_context():
    repeated = report(lambda nbytes: 2 * nbytes / H200.bandwidth, contexts=(8192,))
    repeated["results"] += repeated["results"]
    assert fit_bandwidth(repeated).bandwidth_fraction == pytest.approx(0.5)


def test_gpu_that_cannot_hold_the_model_has_no_speed(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report(lambda nbytes: nbytes / H200.bandwidth, quantize=None)))
    assert main(["project", "--report", str(path), "--gpu", "rtx4090,h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("does not fit" in line for line in lines if line.startswith("| rtx4090"))
    assert not any("does not fit" in line for line in lines if line.startswith("| h200"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (report(lambda nbytes: 1e-3, device="Some card"), "'Some card', whose bandwidth is not known"),
        (report(lambda nbytes: 1e-3, results=[]), "no case of batch size 1"),
        (report(lambda nbytes: 1 / nbytes), "a longer context takes no longer"),
    ],
)
def test_insufficient_reports_are_refused(data, message):
    with pytest.raises(GlmError, match=message):
        fit_bandwidth(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ('{"kind": "prefill"}', "is not a report of"),
        ('{"kind": "decode"}', "has no model: another version"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(GlmError, match=message):
        main(["project", "--report", str(path)])
