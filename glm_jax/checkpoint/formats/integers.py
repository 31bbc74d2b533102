"""Unpacked integers with scales and zero points, stored again as QuantizedTensors: one way for all integer formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.base import Array, QuantizedModule, StoredWeight, check_scales, dequantized_dtype
from glm_jax.checkpoint.formats.bit_packing import unpack_bits
from glm_jax.weights import QuantizedTensor, QuantSpec, pack_nibbles
from glm_jax.weights.quant_spec import ScaleDtype, ZeroPointKind


@dataclasses.dataclass(frozen=True, slots=True)
class UnpackedIntegers:
    """A matrix of unsigned codes, before it is packed again.

    Attributes:
        codes: uint8 ``[*stack, O, I]``, 0 .. 2^bits − 1; or two to a byte, the even column in the low half.
        scales: ``[*stack, O, G]``.
        zeros: zero points or biases like the scales; None when all zero points are 2^(bits − 1).
        group_index: of each column, int ``[I]``, or None for ``column // group``.
        is_nibble_packed: whether there are two codes to a byte.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    group_index: Array | None = None
    is_nibble_packed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class IntegerLayout:
    """What headers and configuration say about a matrix of integers.

    Attributes:
        shape: ``[*stack, O, I]``.
        bits: of a code as stored.
        group_size: inputs that share a scale; 0 for all.
        scale_kind: dtype of the scales, as a QuantSpec calls it.
        zero_kind: what there is beside them.
        is_permuted: whether columns belong to groups in another order than their own.
        has_equal_groups: whether the groups are equally large.
        has_row_scales: whether each output has scales of its own (else one serves all).
        scales_suffix: name of their tensor, for messages.
    """

    shape: tuple[int, ...]
    bits: int
    group_size: int
    scale_kind: ScaleDtype
    zero_kind: ZeroPointKind = "none"
    is_permuted: bool = False
    has_equal_groups: bool = True
    has_row_scales: bool = True
    scales_suffix: str = "scales"

    @property
    def spec(self) -> QuantSpec | None:
        """How such a matrix is stored here; None if only dense values keep it without loss."""
        inputs = self.shape[-1]
        if not self.has_equal_groups or (self.bits <= 4 and inputs % 2) or inputs % (self.group_size or inputs):
            return None
        block = (1 if self.has_row_scales else 0, self.group_size)
        return QuantSpec(
            kind="int4" if self.bits <= 4 else "int8",
            block=block,
            scale=self.scale_kind,
            zero=self.zero_kind,
            permuted=self.is_permuted,
        )


def stored_integer_weight(
    module: QuantizedModule, layout: IntegerLayout, read: Callable[[int | None], UnpackedIntegers]
) -> StoredWeight:
    """The weight; ``read`` unpacks it, or one row of its stack."""
    spec, dtype = layout.spec, dequantized_dtype(layout.scale_kind)

    def build(row: int | None) -> Array | QuantizedTensor:
        matrix = read(row)
        check_scales(module, layout.scales_suffix, matrix.scales)
        if layout.zero_kind == "bias" and not np.isfinite(np.asarray(matrix.zeros, np.float32)).all():
            raise module.error("biases holds values that are not finite: the file is damaged")
        return _dequantize(matrix, layout) if spec is None else _to_quantized_tensor(matrix, layout, spec, dtype)

    return module.stored_weight(layout.shape, np.float32 if spec is None else dtype, spec, build)


def unpack_codes(packed: Array, layout: IntegerLayout) -> tuple[Array, bool]:
    """Codes of words packed along the inputs, and whether they are two to a byte, as they are to be stored."""
    packed, inputs = np.ascontiguousarray(packed), layout.shape[-1]
    # 4 bits in little-endian words are in the order of pack_nibbles already.
    if layout.bits == 4 and layout.spec is not None and not layout.is_permuted:
        return packed.view(np.uint8)[..., : inputs // 2], True
    return unpack_bits(packed, layout.bits, inputs), False


def center_codes(codes: Array, bits: int) -> Array:
    """Codes around 2^(bits − 1) as int8 around 0."""
    return (codes ^ np.uint8(0x80)).view(np.int8) if bits == 8 else codes.view(np.int8) - np.int8(1 << (bits - 1))


def _to_quantized_tensor(
    matrix: UnpackedIntegers, layout: IntegerLayout, spec: QuantSpec, dtype: np.dtype[Any]
) -> QuantizedTensor:
    codes, permutation = matrix.codes, None
    if spec.permuted:
        assert matrix.group_index is not None  # the layout says permuted only where there are groups
        permutation = np.argsort(matrix.group_index, kind="stable").astype(np.int32)
        codes = np.take(codes, permutation, axis=-1)
    if matrix.is_nibble_packed:
        pass
    elif spec.kind == "int4":
        shift = 8 - (1 << (layout.bits - 1)) if spec.zero == "none" else 0
        codes = pack_nibbles(codes + np.uint8(shift) if shift else codes)
    elif spec.zero == "none":
        codes = center_codes(np.ascontiguousarray(codes), layout.bits)
    zeros = matrix.zeros
    if spec.zero == "point":
        assert zeros is not None
        zeros = np.ascontiguousarray(zeros, np.uint8 if spec.kind == "int4" else np.int16)
    scales = np.ascontiguousarray(matrix.scales)
    parts = {"zeros": zeros if spec.zero != "none" else None, "permutation": permutation}
    return QuantizedTensor(np.ascontiguousarray(codes), scales, **parts, spec=spec, dtype=dtype)


def _dequantize(matrix: UnpackedIntegers, layout: IntegerLayout) -> Array:
    """Values in float32, for what no QuantSpec describes."""
    inputs = layout.shape[-1]
    groups = np.arange(inputs) // (layout.group_size or inputs) if matrix.group_index is None else matrix.group_index
    scales = matrix.scales.astype(np.float32)[..., groups]
    if layout.zero_kind == "bias":
        return matrix.codes.astype(np.float32) * scales + np.asarray(matrix.zeros, np.float32)[..., groups]
    middle = np.float32(1 << (layout.bits - 1))
    points = middle if matrix.zeros is None else np.asarray(matrix.zeros, np.float32)[..., groups]
    return (matrix.codes.astype(np.float32) - points) * scales
