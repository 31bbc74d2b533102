"""Quantized checkpoints that nothing here reads, refused by name instead of as a list of odd tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from glm_jax.checkpoint.formats.quantization_config import QuantizationConfig
from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

SUPPORTED_METHODS = ("compressed-tensors", "gptq", "auto-round", "awq", "fp8", "modelopt", "mlx")
# compressed-tensors' "format", in the whole configuration or in a group of it.
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
# Last part of a tensor's name -> what writes such tensors.
_WRITER_BY_SUFFIX = {
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
# Sections that say the stored weights are not the model's, but belong to turned activations.
_ROTATION_KEYS = ("transform_config", "rotation_config", "rotation")


def reject_unsupported_formats(description: QuantizationConfig, names: Iterable[str]) -> None:
    """Refuses a checkpoint in a format that nothing here reads.

    Args:
        description: of its configuration.
        names: of its tensors.

    Raises:
        CheckpointError: naming the format.
    """
    found = _from_description(description)
    if found is None:
        endings = {name.rpartition(".")[2] for name in names}
        found = next((writer for suffix, writer in _WRITER_BY_SUFFIX.items() if suffix in endings), None)
    if found is not None:
        raise CheckpointError(
            f"this checkpoint is quantized ({found}), which is not read: use one of compressed-tensors, GPTQ, AWQ, "
            "AutoRound, FP8, NVFP4, MXFP4 or MLX, or the original in bfloat16"
        )


def _from_description(description: QuantizationConfig) -> str | None:
    method, section = description.quant_method, description.section
    if method is not None and method not in SUPPORTED_METHODS:
        return _UNSUPPORTED_METHODS.get(method, f"unknown quant_method {printable(method)}")
    turned = next((key for key in _ROTATION_KEYS if section.get(key)), None)
    if turned:
        return f"{method} with {turned}"
    return _unsupported_layout(section) if method == "compressed-tensors" else None


def _unsupported_layout(section: Any) -> str | None:
    groups = section.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    layouts = [section.get("format"), *(scheme.get("format") for scheme in schemes if isinstance(scheme, dict))]
    for layout in layouts:
        if layout is not None and layout not in (*_LAYOUTS, *_FLOAT_LAYOUTS):
            return f"compressed-tensors, {printable(str(layout))}"
    sparsity = section.get("sparsity_config")
    kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    return None if kind == "dense" else f"compressed-tensors, {printable(str(kind))}"
