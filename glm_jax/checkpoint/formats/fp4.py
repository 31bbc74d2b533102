"""4-bit floats: NVFP4 of compressed-tensors and ModelOpt, and MXFP4; two values to a byte, the even column first.

A group of 16 inputs has an e4m3 scale and the matrix one float32 more: compressed-tensors' ``weight_global_scale``
divides, ModelOpt's ``weight_scale_2`` multiplies. In MXFP4 a group of 32 has a power of two. Scales of activations are
ignored: products here take activations as they are.
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
    scale_kind,
)
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.weights import QuantizedTensor, QuantSpec

# What holds the codes -> where the scale of the matrix is, and how it applies.
_GLOBAL_SCALES: dict[str, tuple[str, Literal["divide", "multiply"]]] = {
    "weight_packed": ("weight_global_scale", "divide"),
    "weight": ("weight_scale_2", "multiply"),
}


def read_fp4(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """A module of ``weight_packed`` or ``weight`` (uint8), ``weight_scale`` and perhaps a scale of the matrix.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    codes = "weight_packed" if "weight_packed" in module else "weight"
    outer, how = _GLOBAL_SCALES[codes]
    packed = module.require(codes, ("U8",)).shape
    if len(packed) not in (2, 3):
        raise module.error(f"{codes} has shape {list(packed)}, expected 2 or 3 dimensions")
    if scheme.kind == "int" or scheme.bits not in (None, 4):
        said = f"{scheme.bits}-bit {'integers' if scheme.kind == 'int' else 'floats'}"
        raise module.error(f"{codes} holds bytes, which for the configuration's {said} is not read")
    scale = module.require("weight_scale", ("F8_E4M3", "U8", "F8_E8M0"), len(packed))
    shape, kind = (*packed[:-1], 2 * packed[-1]), scale_kind(scale)
    module.require_shape("weight_scale", (SAFETENSORS_DTYPE_NAMES[scale.dtype],), (*packed[:-1], scale.shape[-1]))
    group = infer_block_size(module, shape[-1], scale.shape[-1], scheme.group_size, "inputs")
    has_outer = kind == "e4m3"
    if has_outer:
        stack = shape[:-2]
        module.require_shape(outer, ("F32",), (), (1,), stack, (*stack, 1), (*stack, 1, 1))
    elif outer in module:
        raise module.error(f"{outer} does not go with scales that are powers of two")
    spec = QuantSpec(kind="fp4", block=(1, group), scale=kind, outer=how if has_outer else "none")

    def build(row: int | None) -> QuantizedTensor:
        scales = check_byte_scales(module, "weight_scale", module.read("weight_scale", row), kind)
        whole = _read_global_scale(module, outer, shape[:-2], row) if has_outer else None
        return QuantizedTensor(module.read(codes, row), scales, outer=whole, spec=spec)

    return module.stored_weight(shape, "float32", spec, build)


def _read_global_scale(module: QuantizedModule, part: str, stack: tuple[int, ...], row: int | None) -> Array:
    values = module.read(part).reshape(-1)
    values = np.broadcast_to(values, stack or (1,)).reshape(stack) if values.size == 1 else values.reshape(stack)
    if not (np.isfinite(values) & (values > 0)).all():
        raise module.error(f"{part} must be positive, not {values.tolist()}: the file is damaged")
    return np.asarray(values if row is None else values[row])
