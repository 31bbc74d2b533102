"""Matrices of whole bytes: float8 (e4m3) with scales per matrix, output, group or block, and 8-bit integers.

compressed-tensors and ModelOpt call the scales ``weight_scale``, DeepSeek's layout ``weight_scale_inv``; both are
multiplied. Blocks may be cut off at the edges. Scales of activations are ignored: products here take activations as
they are.
"""

from __future__ import annotations

import numpy as np

from glm_jax.checkpoint.formats.base import (
    BYTE_SCALE_DTYPES,
    E4M3_NAN,
    SCALE_DTYPES,
    Array,
    QuantizedModule,
    StoredWeight,
    check_byte_scales,
    check_scales,
    dequantized_dtype,
    infer_block_size,
    scale_kind,
)
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.weights import QuantizedTensor, QuantSpec

_SCALES = (*SCALE_DTYPES, "U8", "F8_E8M0")


def read_fp8_or_int8(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """A module of ``weight`` (float8 or int8) and ``weight_scale`` or ``weight_scale_inv``.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    part = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
    weight = module.require("weight", ("F8_E4M3", "I8"))
    if len(weight.shape) not in (2, 3):
        raise module.error(f"weight has shape {list(weight.shape)}, expected 2 or 3 dimensions")
    grid = _scale_grid(module, part, weight.shape)
    if SAFETENSORS_DTYPE_NAMES[weight.dtype] == "I8":
        return _read_int8(module, part, weight.shape, grid)
    if scheme.kind == "int" or scheme.bits not in (None, 8):
        said = f"{scheme.bits}-bit {'integers' if scheme.kind == 'int' else 'floats'}"
        raise module.error(f"the configuration says {said}, but weight is float8")
    scale = scale_kind(module.require(part, _SCALES))
    spec = QuantSpec(kind="fp8", block=_block_shape(module, weight.shape, grid, scheme), scale=scale)

    def build(row: int | None) -> QuantizedTensor:
        codes = module.read("weight", row).view(np.uint8)
        if ((codes & 0x7F) == E4M3_NAN).any():
            raise module.error("weight holds values that are not numbers: the file is damaged")
        scales = _read_scales(module, part, row, weight.shape, grid)
        check = check_byte_scales(module, part, scales, scale) if scale in BYTE_SCALE_DTYPES.values() else None
        scales = check_scales(module, part, scales) if check is None else check
        return QuantizedTensor(codes, scales, spec=spec, dtype=dequantized_dtype(scale))

    return module.stored_weight(weight.shape, dequantized_dtype(scale), spec, build)


def _scale_grid(module: QuantizedModule, part: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the scales of one matrix."""
    scale, stack, outputs = module.require(part, _SCALES), shape[:-2], shape[-2]
    if len(scale.shape) == len(shape) and scale.shape[:-2] == stack:
        return scale.shape[-2], scale.shape[-1]
    if scale.shape in ((), (1,), stack, (*stack, 1)):
        return 1, 1
    if scale.shape == (*stack, outputs):
        return outputs, 1
    raise module.error(f"{part} has shape {list(scale.shape)}, which does not go with a weight {list(shape)}")


def _read_scales(
    module: QuantizedModule, part: str, row: int | None, shape: tuple[int, ...], grid: tuple[int, int]
) -> Array:
    stack, whole = shape[:-2], module.read(part)
    if stack and whole.size == 1:
        whole = np.broadcast_to(whole.reshape(()), stack)
    scales = whole if row is None else whole[row]
    return np.ascontiguousarray(scales).reshape(*(stack if row is None else ()), *grid)


def _block_shape(
    module: QuantizedModule, shape: tuple[int, ...], grid: tuple[int, int], declared: DeclaredScheme
) -> tuple[int, int]:
    (outputs, inputs), (rows, columns) = shape[-2:], grid
    said = declared.block or (None, None)
    if said == (1, 0) and grid == (1, 1) and outputs != 1:
        raise module.error("the configuration says one scale per output, but there is one for all")
    return (
        infer_block_size(module, outputs, rows, said[0], "outputs", allow_partial=True),
        infer_block_size(module, inputs, columns, said[1], "inputs", allow_partial=True),
    )


def _read_int8(module: QuantizedModule, part: str, shape: tuple[int, ...], grid: tuple[int, int]) -> StoredWeight:
    """8-bit integers as they are, with one scale per output, group or matrix."""
    (outputs, inputs), (rows, columns) = shape[-2:], grid
    if rows not in (1, outputs) or inputs % columns:
        raise module.error(f"int8 with a grid of {rows} x {columns} scales is not read")
    scale = module.require(part, tuple(SCALE_DTYPES))
    pointed = "weight_zero_point" in module
    if pointed:
        module.require_shape("weight_zero_point", ("I8",), scale.shape)
    layout = IntegerLayout(
        shape=shape,
        bits=8,
        group_size=0 if columns == 1 else inputs // columns,
        scale_kind=scale_kind(scale),
        zero_kind="point" if pointed else "none",
        has_row_scales=rows == outputs,
        scales_suffix=part,
    )

    def read(row: int | None) -> UnpackedIntegers:
        codes = module.read("weight", row).view(np.uint8) ^ np.uint8(0x80)
        zeros = None
        if pointed:
            zeros = _read_scales(module, "weight_zero_point", row, shape, grid).astype(np.int16) + np.int16(128)
        return UnpackedIntegers(codes, _read_scales(module, part, row, shape, grid), zeros)

    return stored_integer_weight(module, layout, read)
