"""The golden files (see ``tests/checkpoint/formats/golden/generate_golden.py``) and small checkpoints around quantised modules."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from glm_jax.checkpoint.formats import read_formats
from glm_jax.checkpoint.safetensors.reader import Reader, Shard

FOLDER = Path(__file__).parent / "golden"
MODULE = "model.layers.1.self_attn.o_proj"


@dataclasses.dataclass
class Case:
    """One matrix: what its library wrote, and what the library reads back."""

    name: str
    tensors: dict
    config: dict
    shape: tuple
    sha256: str
    codes: np.ndarray | None = None
    zeros: np.ndarray | None = None
    scales: np.ndarray | None = None
    library: np.ndarray | None = None


@functools.cache
def cases(file):
    shard = Shard(FOLDER / f"{file}.safetensors")
    found = []
    for name, text in sorted(shard.header.metadata.items()):
        info = json.loads(text)
        own = {
            key.removeprefix(f"{name}/"): shard.get(key) for key in shard.header.tensors if key.startswith(f"{name}/")
        }
        expected = {key[1:]: array for key, array in own.items() if key.startswith("=")}
        tensors = {key: array for key, array in own.items() if not key.startswith("=")}
        found.append(Case(name, tensors, info["config"], tuple(info["shape"]), info["sha256"], **expected))
    return tuple(found)


def case(file, name):
    return next(found for found in cases(file) if found.name == name)


def named(file):
    """Parameters and ids of a test over a file's cases."""
    return {"argvalues": cases(file), "ids": [found.name for found in cases(file)]}


def write(folder, tensors, config=None, exported=None):
    """A folder with these tensors; `config` is the section that describes the quantisation."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    if exported is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(exported))
    mlx = config is not None and "mode" in config
    return {} if config is None else {"quantization" if mlx else "quantization_config": config}


def read_all(folder, tensors, config=None, exported=None):
    section = write(folder, tensors, config, exported)
    return read_formats(Reader.open(folder), section, folder)


def read(folder, parts, config=None, exported=None):
    """The one weight of a checkpoint with one module of these parts."""
    found = read_all(folder, {f"{MODULE}.{part}": array for part, array in parts.items()}, config, exported)
    assert list(found) == [f"{MODULE}.weight"]
    return found[f"{MODULE}.weight"]


def digest(values):
    assert values.dtype == np.float32
    return hashlib.sha256(np.ascontiguousarray(values + np.float32(0))).hexdigest()


def stack(case, count=3):
    """A stack of matrices: the case's, with rows rotated by 0, 1, 2, …"""
    return {
        part: np.stack([np.roll(array, i, 0) for i in range(count)]) if array.ndim > 1 else array
        for part, array in case.tensors.items()
    }


def bits(array):
    """Bit patterns, so that comparisons see signs of zeros and do not depend on the dtype's own arithmetic."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
