"""Rejects quantized checkpoints in unsupported formats by the format's name instead of as a list of unknown tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from glm_jax.checkpoint.formats.quantization_config import QuantizationConfig
from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

SUPPORTED_METHODS = ("compressed-tensors", "gptq", "auto-round", "awq", "fp8", "modelopt", "mlx")
# Supported values of compressed-tensors' "format", for the whole configuration or for one of its groups.
_LAYOUTS = ("dense", "pack-quantized", "float-quantized", "naive-quantized", "int-quantized", "mixed-precision")
_FLOAT_LAYOUTS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
_UNSUPPORTED_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes-4bit": "bitsandbytes",
    "bitsandbytes-8bit": "bitsandbytes",
    "hqq": "HQQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "quanto": "quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "mxfp4": "MXFP4 of gpt-oss",
    "torchao": "torchao",
    "quark": "AMD Quark",
    "eetq": "EETQ",
    "fbgemm-fp8": "FBGEMM FP8",
}
# Last component of a tensor's name -> the format that has such tensors.
_FORMAT_BY_SUFFIX = {
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "W_q": "HQQ",
    "trellis": "EXL3",
    "q_invperm": "EXL2",
    "_data": "quanto",
    "codebooks": "AQLM",
    "sparse_bitmask": "sparse compressed-tensors",
    "bitmask": "sparse compressed-tensors",
    "pre_quant_scale": "ModelOpt with scaled inputs (AWQ)",
    "svdquant_lora_a": "ModelOpt with SVDQuant",
    "weight_blocks": "MXFP4 of gpt-oss",
    "gate_up_proj_blocks": "MXFP4 of gpt-oss",
}
# Sections which say that the stored weights are rotated and only fit equally rotated activations.
_ROTATION_KEYS = ("transform_config", "rotation_config", "rotation")


def reject_unsupported_formats(quant_config: QuantizationConfig, names: Iterable[str]) -> None:
    """Rejects a checkpoint whose quantization format is not supported.

    Args:
        quant_config: Quantization configuration of the checkpoint.
        names: Names of the checkpoint's tensors.

    Raises:
        CheckpointError: If the configuration or the tensors show such a format; the message names it.
    """
    unsupported = _declared_unsupported_format(quant_config)
    if unsupported is None:
        suffixes = {name.rpartition(".")[2] for name in names}
        unsupported = next((form for suffix, form in _FORMAT_BY_SUFFIX.items() if suffix in suffixes), None)
    if unsupported is not None:
        raise CheckpointError(
            f"this checkpoint is quantized ({unsupported}), which is not read: use one of compressed-tensors, GPTQ, "
            "AWQ, AutoRound, FP8, NVFP4, MXFP4 or MLX, or the original in bfloat16"
        )


def _declared_unsupported_format(quant_config: QuantizationConfig) -> str | None:
    method, section = quant_config.quant_method, quant_config.section
    if method is not None and method not in SUPPORTED_METHODS:
        return _UNSUPPORTED_METHODS.get(method, f"unknown quant_method {printable(method)}")
    rotation = next((key for key in _ROTATION_KEYS if section.get(key)), None)
    if rotation:
        return f"{method} with {rotation}"
    return _unsupported_layout(section) if method == "compressed-tensors" else None


def _unsupported_layout(section: Mapping[str, Any]) -> str | None:
    groups = section.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    layouts = [section.get("format"), *(scheme.get("format") for scheme in schemes if isinstance(scheme, dict))]
    for layout in layouts:
        if layout is not None and layout not in (*_LAYOUTS, *_FLOAT_LAYOUTS):
            return f"compressed-tensors, {printable(str(layout))}"
    sparsity = section.get("sparsity_config")
    kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    return None if kind == "dense" else f"compressed-tensors, {printable(str(kind))}"
