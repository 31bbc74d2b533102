"""Reads 4-bit floats: NVFP4 of compressed-tensors and ModelOpt, and MXFP4, packed in pairs with the even input first.

In NVFP4 each group of 16 inputs has an e4m3 scale, and the matrix has one float32 global scale: values are divided by
compressed-tensors' ``weight_global_scale``, but multiplied by ModelOpt's ``weight_scale_2``. In MXFP4 each group of 32
inputs has a power of two as its scale. Activation scales are ignored, because activations are not quantized here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from glm_jax.checkpoint.formats.base import (
    Array,
    QuantizedModule,
    StoredWeight,
    check_byte_scales,
    infer_block_size,
    scale_dtype_of,
)
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.weights import QuantizedTensor, QuantSpec

# Suffix of the packed values -> suffix of the matrix's global scale, and how the scale applies.
_GLOBAL_SCALES: dict[str, tuple[str, Literal["divide", "multiply"]]] = {
    "weight_packed": ("weight_global_scale", "divide"),
    "weight": ("weight_scale_2", "multiply"),
}


def read_fp4(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """Reads a module of ``weight_packed`` or ``weight``, ``weight_scale`` and, for NVFP4, a global scale.

    The packed values are ``uint8 [*stack, O, I/2]``, the scales 8 bits wide ``[*stack, O, G]``.

    Raises:
        CheckpointError: If tensors are missing, or contradict each other or the configuration.
    """
    codes_suffix = "weight_packed" if "weight_packed" in module else "weight"
    packed_shape = module.require(codes_suffix, ("U8",)).shape
    if len(packed_shape) not in (2, 3):
        raise module.error(f"{codes_suffix} has shape {list(packed_shape)}, expected 2 or 3 dimensions")
    if scheme.kind == "int" or scheme.bits not in (None, 4):
        declared = f"{scheme.bits}-bit {'integers' if scheme.kind == 'int' else 'floats'}"
        raise module.error(f"{codes_suffix} holds bytes, which for the configuration's {declared} is not read")
    scales = module.require("weight_scale", ("F8_E4M3", "U8", "F8_E8M0"), len(packed_shape))
    scale_shape = (*packed_shape[:-1], scales.shape[-1])
    module.require_shape("weight_scale", (SAFETENSORS_DTYPE_NAMES[scales.dtype],), scale_shape)
    shape, scale_dtype = (*packed_shape[:-1], 2 * packed_shape[-1]), scale_dtype_of(scales)
    group_size = infer_block_size(module, shape[-1], scales.shape[-1], scheme.group_size, "inputs")
    global_suffix, global_kind = _GLOBAL_SCALES[codes_suffix]
    has_global_scale = scale_dtype == "e4m3"
    if has_global_scale:
        stack = shape[:-2]
        module.require_shape(global_suffix, ("F32",), (), (1,), stack, (*stack, 1), (*stack, 1, 1))
    elif global_suffix in module:
        raise module.error(f"{global_suffix} does not go with scales that are powers of two")
    outer = global_kind if has_global_scale else "none"
    spec = QuantSpec(kind="fp4", block=(1, group_size), scale=scale_dtype, outer=outer)

    def build(index: int | None) -> QuantizedTensor:
        block_scales = check_byte_scales(module, "weight_scale", module.read("weight_scale", index), scale_dtype)
        global_scale = _read_global_scale(module, global_suffix, shape[:-2], index) if has_global_scale else None
        return QuantizedTensor(module.read(codes_suffix, index), block_scales, outer=global_scale, spec=spec)

    return module.stored_weight(shape, "float32", spec, build)


def _read_global_scale(module: QuantizedModule, suffix: str, stack: tuple[int, ...], index: int | None) -> Array:
    """Reads the global scales, ``float32 [*stack]``, or the scale of one entry of the stack."""
    values = module.read(suffix).reshape(-1)
    values = np.broadcast_to(values, stack or (1,)).reshape(stack) if values.size == 1 else values.reshape(stack)
    if not (np.isfinite(values) & (values > 0)).all():
        raise module.error(f"{suffix} must be positive, not {values.tolist()}: the file is damaged")
    return np.asarray(values if index is None else values[index])
