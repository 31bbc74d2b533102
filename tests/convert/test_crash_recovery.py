"""A conversion may be killed at any moment: the same command again gives the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert.calibrate import CalibrationConfig
from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.errors import CheckpointError
from tests.builders import hf_checkpoints, hf_configs
from tests.builders.calibration_checkpoint import write_calibration_checkpoint
from tests.checkpoint.assertions import assert_same_tensors, read_converted_folder

ROOT = Path(__file__).parents[2]
QUICK = ["the middle of the second layer", "before a layer's record", "half of the manifest"]
SOAK = [
    "the first array of the first layer",
    "the middle of the prediction layer",
    "half of a layer's record",
    "before config.json",
    "before the manifest",
    "before anything is said",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = hf_configs.odd_size_config()
    tensors = hf_checkpoints.random_tensors(config, 0, dtype=hf_checkpoints.BFLOAT16)
    return hf_checkpoints.write_checkpoint(tmp_path_factory.mktemp("source"), config, tensors)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an undisturbed conversion gives."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(source, folder)
    return read_converted_folder(folder)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A small model with a tokenizer, so that calibration text can be encoded."""
    return write_calibration_checkpoint(tmp_path_factory.mktemp("calibrated"))


def die(point, source, destination, form="orbax", **options):
    text = json.dumps(options)
    command = [sys.executable, "-m", "tests.convert.crash_helpers", point, str(source), str(destination), form, text]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


def refused(folder):
    with pytest.raises(CheckpointError):
        open_source(folder)


def dies_and_goes_on(point, source, whole, folder):
    die(point, source, folder)
    refused(folder)
    convert_checkpoint(source, folder)
    assert read_converted_folder(folder) == whole
    assert open_source(folder).info.kind == "converted"


@pytest.mark.parametrize("point", QUICK)
def test_killed_at(point, source, whole, tmp_path):
    dies_and_goes_on(point, source, whole, tmp_path / "out")


@pytest.mark.soak
@pytest.mark.parametrize("point", SOAK)
def test_killed_at_more_points(point, source, whole, tmp_path):
    dies_and_goes_on(point, source, whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("point", "method"),
    [
        ("before a layer's record", "mse"),
        pytest.param("before a layer's record", "signround", marks=pytest.mark.soak),
    ],
)
def test_quantizing_killed_at(point, method, calibrated, tmp_path):
    quick = {"max_windows": 8, "window_tokens": 32, "steps": 5}
    text = {"calibration": CalibrationConfig(**quick)} if method == "signround" else {}
    options = {"quantize": "int4", "method": method}
    convert_checkpoint(calibrated, tmp_path / "whole", **options, **text)
    die(point, calibrated, tmp_path / "out", **options, **({"calibration": quick} if text else {}))
    refused(tmp_path / "out")
    report = convert_checkpoint(calibrated, tmp_path / "out", **options, **text)
    assert report.kept
    assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "whole")


def test_killed_after_the_manifest(source, whole, tmp_path):
    """The folder is complete: it loads as it is, and the same command only tidies up."""
    die("after the manifest", source, tmp_path / "out")
    assert open_source(tmp_path / "out").info.kind == "converted"
    assert convert_checkpoint(source, tmp_path / "out").written == 0
    assert read_converted_folder(tmp_path / "out") == whole
    assert not (tmp_path / "out" / ".convert").exists()


@pytest.mark.soak
@pytest.mark.parametrize("point", ["the middle of a shard", "before a shard", "before the index"])
def test_safetensors_killed_at(point, source, tmp_path):
    die(point, source, tmp_path / "out", "safetensors")
    refused(tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", to="safetensors")
    assert_same_tensors(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.soak
def test_twenty_random_kills(tmp_path):
    """At random moments of a conversion that takes a while, again and again into the same folder."""
    config = hf_configs.odd_size_config(
        hidden_size=512, moe_intermediate_size=256, intermediate_size=1024, num_hidden_layers=12
    )
    source = hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(config, 0))
    convert_checkpoint(source, tmp_path / "whole")
    whole, out = read_converted_folder(tmp_path / "whole"), tmp_path / "out"
    moments = random.Random(0)
    kills = finished = 0
    while kills < 20:
        kills += _kill_after(moments.uniform(0, 2.0), source, out)
        if (out / "manifest.json").exists() and not (out / ".convert").exists():
            assert read_converted_folder(out) == whole
            finished += 1
            out = tmp_path / f"out{finished}"
    convert_checkpoint(source, out)
    assert read_converted_folder(out) == whole


def _kill_after(seconds, source, out):
    """Kills the command that long after it began to work; False if it was done before."""
    command = [sys.executable, "-m", "convert", str(source), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (out / ".convert" / "lock").exists() and process.poll() is None:
            time.sleep(0.002)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False
