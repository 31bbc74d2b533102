"""Memory of loading and converting at full width, measured in a process of its own.

Needs about 28 GB of disk: two folders of 2.7 GB (two layers), and three of 6.5 GB (four layers and the prediction
layer), of which the two of safetensors repeat embedding and head in the prediction layer, 1.3 GB each; quantized ones
take less.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]


def measure(step, source, *more):
    command = [sys.executable, "-m", "tests.convert.peak_memory", step, str(source), *map(str, more)]
    # One device, as on a person's machine.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    print(step, source, figures)
    return figures


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full-width")
    yield folder
    shutil.rmtree(folder)


def test_loading_two_layers(base):
    """Within 1.3 times the checkpoint's size, from every form."""
    text = "synthetic:flash?layers=2&mtp=0"
    measure("convert", text, base / "hf2", "safetensors")
    measure("convert", base / "hf2", base / "ours2")
    for source in (base / "hf2", base / "ours2", text):
        figures = measure("load", source)
        assert figures["peak"] <= 1.3 * figures["size"], source


def test_converting_four_layers(base):
    """Within one part and a gigabyte, in both directions."""
    steps = [
        ("synthetic:flash?layers=4", base / "hf4", "safetensors"),
        (base / "hf4", base / "ours4", "orbax"),
        (base / "ours4", base / "back4", "safetensors"),
    ]
    for source, destination, form in steps:
        figures = measure("convert", source, destination, form)
        assert figures["peak"] <= figures["part"] + 1e9, source
    for path in sorted((base / "hf4").glob("*.safetensors")):
        assert filecmp.cmp(path, base / "back4" / path.name, shallow=False)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_quantizing_four_layers(base, method):
    """Within 4 GB, whatever the size of the model: a layer is in memory at a time."""
    source = base / "quantize4"
    if not source.exists():
        measure("convert", "synthetic:flash?layers=4", source, "safetensors")
    figures = measure("convert", source, base / f"int4-{method}", "orbax", "int4", method)
    assert figures["peak"] <= 4e9
    assert figures["size"] <= 0.31 * 2 * 3.26e9  # of bfloat16 with the prediction layer
