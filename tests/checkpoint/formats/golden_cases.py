"""Loads the golden files that ``golden/generate_golden.py`` writes, and builds small checkpoints of one module."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from glm_jax.checkpoint.formats import read_stored_weights
from glm_jax.checkpoint.safetensors.reader import SafetensorsFile, SafetensorsReader

GOLDEN_FOLDER = Path(__file__).parent / "golden"
MODULE_NAME = "model.layers.1.self_attn.o_proj"


@dataclasses.dataclass
class GoldenCase:
    """One matrix: the tensors that its library wrote, and the numbers that the library reads back."""

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
def load_cases(file):
    shard = SafetensorsFile(GOLDEN_FOLDER / f"{file}.safetensors")
    found = []
    for name, text in sorted(shard.header.metadata.items()):
        info = json.loads(text)
        own = {
            key.removeprefix(f"{name}/"): shard.get_tensor(key)
            for key in shard.header.tensors
            if key.startswith(f"{name}/")
        }
        expected = {key[1:]: array for key, array in own.items() if key.startswith("=")}
        tensors = {key: array for key, array in own.items() if not key.startswith("=")}
        found.append(GoldenCase(name, tensors, info["config"], tuple(info["shape"]), info["sha256"], **expected))
    return tuple(found)


def get_case(file, name):
    return next(found for found in load_cases(file) if found.name == name)


def parametrize_cases(file):
    """Parameters and ids of a test over a file's cases."""
    return {"argvalues": load_cases(file), "ids": [found.name for found in load_cases(file)]}


def write_module_checkpoint(folder, tensors, config=None, hf_quant_config=None):
    """Writes a folder with these tensors and returns its config; `config` is the section about quantization."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    if hf_quant_config is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant_config))
    mlx = config is not None and "mode" in config
    return {} if config is None else {"quantization" if mlx else "quantization_config": config}


def read_weights(folder, tensors, config=None, hf_quant_config=None):
    section = write_module_checkpoint(folder, tensors, config, hf_quant_config)
    return read_stored_weights(SafetensorsReader.open(folder), section, folder)


def read_weight(folder, parts, config=None, hf_quant_config=None):
    """Writes a checkpoint of one module with these tensors, by suffix, and returns its only weight."""
    found = read_weights(
        folder, {f"{MODULE_NAME}.{part}": array for part, array in parts.items()}, config, hf_quant_config
    )
    assert list(found) == [f"{MODULE_NAME}.weight"]
    return found[f"{MODULE_NAME}.weight"]


def values_sha256(values):
    assert values.dtype == np.float32
    return hashlib.sha256(np.ascontiguousarray(values + np.float32(0))).hexdigest()


def stacked_tensors(case, count=3):
    """Tensors of a stack of matrices: those of the case with their rows rotated by 0, 1, 2, …"""
    return {
        part: np.stack([np.roll(array, i, 0) for i in range(count)]) if array.ndim > 1 else array
        for part, array in case.tensors.items()
    }


def bit_patterns(array):
    """Bit patterns, so that comparisons see signs of zeros and do not depend on the dtype's own arithmetic."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
