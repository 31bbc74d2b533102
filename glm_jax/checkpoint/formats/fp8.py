"""Reads matrices of whole bytes: float8 (e4m3) with scales per matrix, output, group or block, and 8-bit integers.

compressed-tensors and ModelOpt call the scales ``weight_scale``, DeepSeek's layout calls them ``weight_scale_inv``;
values are multiplied by both. The last block of a row or column may be cut off. Activation scales are ignored, because
activations are not quantized here.
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
    scale_dtype_of,
)
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.weights import QuantizedTensor, QuantSpec

_SCALES = (*SCALE_DTYPES, "U8", "F8_E8M0")


def read_fp8_or_int8(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """Reads a module of ``weight``, float8 or int8 ``[*stack, O, I]``, and ``weight_scale`` or ``weight_scale_inv``.

    Raises:
        CheckpointError: If tensors are missing, or contradict each other or the configuration.
    """
    suffix = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
    weight = module.require("weight", ("F8_E4M3", "I8"))
    if len(weight.shape) not in (2, 3):
        raise module.error(f"weight has shape {list(weight.shape)}, expected 2 or 3 dimensions")
    grid = _scale_grid(module, suffix, weight.shape)
    if SAFETENSORS_DTYPE_NAMES[weight.dtype] == "I8":
        return _read_int8(module, suffix, weight.shape, grid)
    if scheme.kind == "int" or scheme.bits not in (None, 8):
        declared = f"{scheme.bits}-bit {'integers' if scheme.kind == 'int' else 'floats'}"
        raise module.error(f"the configuration says {declared}, but weight is float8")
    scale_dtype = scale_dtype_of(module.require(suffix, _SCALES))
    spec = QuantSpec(kind="fp8", block=_block_shape(module, weight.shape, grid, scheme), scale=scale_dtype)

    def build(index: int | None) -> QuantizedTensor:
        codes = module.read("weight", index).view(np.uint8)
        if ((codes & 0x7F) == E4M3_NAN).any():
            raise module.error("weight holds values that are not numbers: the file is damaged")
        scales = _read_scales(module, suffix, index, weight.shape, grid)
        if scale_dtype in BYTE_SCALE_DTYPES.values():
            scales = check_byte_scales(module, suffix, scales, scale_dtype)
        else:
            scales = check_scales(module, suffix, scales)
        return QuantizedTensor(codes, scales, spec=spec, dtype=dequantized_dtype(scale_dtype))

    return module.stored_weight(weight.shape, dequantized_dtype(scale_dtype), spec, build)


def _scale_grid(module: QuantizedModule, suffix: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of scales along the outputs and along the inputs of one matrix."""
    scales, stack, outputs = module.require(suffix, _SCALES), shape[:-2], shape[-2]
    if len(scales.shape) == len(shape) and scales.shape[:-2] == stack:
        return scales.shape[-2], scales.shape[-1]
    if scales.shape in ((), (1,), stack, (*stack, 1)):
        return 1, 1
    if scales.shape == (*stack, outputs):
        return outputs, 1
    raise module.error(f"{suffix} has shape {list(scales.shape)}, which does not go with a weight {list(shape)}")


def _read_scales(
    module: QuantizedModule, suffix: str, index: int | None, shape: tuple[int, ...], grid: tuple[int, int]
) -> Array:
    """Reads scales or zero points as ``[*stack, *grid]``, or as ``[*grid]`` for one entry of the stack."""
    stack, scales = shape[:-2], module.read(suffix)
    if stack and scales.size == 1:
        scales = np.broadcast_to(scales.reshape(()), stack)
    scales = scales if index is None else scales[index]
    return np.ascontiguousarray(scales).reshape(*(stack if index is None else ()), *grid)


def _block_shape(
    module: QuantizedModule, shape: tuple[int, ...], grid: tuple[int, int], scheme: DeclaredScheme
) -> tuple[int, int]:
    (outputs, inputs), (rows, columns) = shape[-2:], grid
    declared_outputs, declared_inputs = scheme.block or (None, None)
    if scheme.block == (1, 0) and grid == (1, 1) and outputs != 1:
        raise module.error("the configuration says one scale per output, but there is one for all")
    return (
        infer_block_size(module, outputs, rows, declared_outputs, "outputs", allow_partial=True),
        infer_block_size(module, inputs, columns, declared_inputs, "inputs", allow_partial=True),
    )


def _read_int8(module: QuantizedModule, suffix: str, shape: tuple[int, ...], grid: tuple[int, int]) -> StoredWeight:
    """Reads unpacked 8-bit integers with one scale per output, group or matrix."""
    (outputs, inputs), (rows, columns) = shape[-2:], grid
    if rows not in (1, outputs) or inputs % columns:
        raise module.error(f"int8 with a grid of {rows} x {columns} scales is not read")
    scales = module.require(suffix, tuple(SCALE_DTYPES))
    has_zeros = "weight_zero_point" in module
    if has_zeros:
        module.require_shape("weight_zero_point", ("I8",), scales.shape)
    layout = IntegerLayout(
        shape=shape,
        bits=8,
        group_size=0 if columns == 1 else inputs // columns,
        scale_dtype=scale_dtype_of(scales),
        zero_kind="point" if has_zeros else "none",
        has_row_scales=rows == outputs,
        scales_suffix=suffix,
    )

    def read(index: int | None) -> UnpackedIntegers:
        codes = module.read("weight", index).view(np.uint8) ^ np.uint8(0x80)
        zeros = None
        if has_zeros:
            zeros = _read_scales(module, "weight_zero_point", index, shape, grid).astype(np.int16) + np.int16(128)
        return UnpackedIntegers(codes, _read_scales(module, suffix, index, shape, grid), zeros)

    return stored_integer_weight(module, layout, read)
