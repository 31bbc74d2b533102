"""Recognises quantised checkpoints, so that they are refused by name instead of as a list of odd tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.header import NAMES, TensorEntry, printable
from glm_jax.errors import CheckpointError

# Keys under which config.json describes quantised weights: most writers, compressed-tensors of old, MLX.
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
    "modelopt": "NVIDIA ModelOpt",
    "bitsandbytes": "bitsandbytes",
}
# Last part of a tensor's name -> what writes such tensors.
_SUFFIXES = {
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_scale_inv": "FP8 by blocks",
    "weight_scale_2": "NVIDIA ModelOpt",
    "weight_scale": "FP8",
    "scales": "GPTQ, AWQ or MLX",
    "biases": "MLX",
}


def refuse_quantised(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Refuses weights that are not plain 16- or 32-bit numbers.

    Raises:
        CheckpointError: naming the format.
    """
    found = _from_config(config) or _from_folder(folder) or _from_tensors(entries)
    if found:
        raise CheckpointError(
            f"this checkpoint is quantised ({found}), which this version does not read: "
            "use the original in bfloat16, float16 or float32"
        )


def _from_config(config: Mapping[str, Any]) -> str | None:
    for key in _CONFIG_KEYS:
        value = config.get(key)
        if value is None:
            continue
        if key == "quantization":
            return "MLX"
        method = value.get("quant_method") if isinstance(value, dict) else None
        if method not in _METHODS:
            return f"unknown {key} {printable(repr(method if method is not None else value))}"
        layout = value.get("format") or value.get("packing_format")
        return f"{_METHODS[method]}, {printable(str(layout))}" if layout else _METHODS[method]
    return None


def _from_folder(folder: Path) -> str | None:
    return "NVIDIA ModelOpt" if (folder / "hf_quant_config.json").exists() else None


def _from_tensors(entries: Mapping[str, TensorEntry]) -> str | None:
    endings = {name.rpartition(".")[2] for name in entries}
    by_name = next((writer for suffix, writer in _SUFFIXES.items() if suffix in endings), None)
    return by_name or _from_dtypes(entry.dtype for entry in entries.values())


def _from_dtypes(dtypes: Iterable[np.dtype[Any]]) -> str | None:
    narrow = sorted({NAMES[dtype] for dtype in dtypes if NAMES[dtype].startswith("F8")})
    return f"{', '.join(narrow)} weights" if narrow else None
