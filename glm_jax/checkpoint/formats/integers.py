"""Turns unpacked integers with scales and zero points into QuantizedTensors, in one way for all integer formats."""

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
    """A matrix of unsigned integers as a format stores it, before it is repacked for a QuantizedTensor.

    Attributes:
        codes: Integers 0 .. 2^bits − 1, ``uint8 [*stack, O, I]``; or packed in pairs, ``uint8 [*stack, O, I/2]``, the
            even input in the low half of a byte.
        scales: Scales ``[*stack, O, G]``, with one row instead of O if all outputs share their scales.
        zeros: Zero points or biases, shaped like the scales; None if all zero points are 2^(bits − 1).
        group_index: Group of each input, integers ``[I]``; None if input i belongs to group ``i // group_size``.
        is_nibble_packed: Whether ``codes`` holds two integers per byte.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    group_index: Array | None = None
    is_nibble_packed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class IntegerLayout:
    """Layout of a matrix of integers, known from headers and configuration before any value is read.

    Attributes:
        shape: Shape of the weight, ``[*stack, O, I]``.
        bits: Bits of an integer as stored in the file.
        group_size: Number of inputs that share a scale; 0 if all do.
        scale_dtype: Dtype of the scales by the QuantSpec's name.
        zero_kind: Whether each scale has a zero point, a bias, or neither.
        is_permuted: Whether a group index assigns inputs to groups in another order than their own.
        has_equal_groups: Whether all groups have the same number of inputs.
        has_row_scales: Whether each output has scales of its own; otherwise all outputs share them.
        scales_suffix: Suffix of the tensor of scales, for error messages.
    """

    shape: tuple[int, ...]
    bits: int
    group_size: int
    scale_dtype: ScaleDtype
    zero_kind: ZeroPointKind = "none"
    is_permuted: bool = False
    has_equal_groups: bool = True
    has_row_scales: bool = True
    scales_suffix: str = "scales"

    @property
    def spec(self) -> QuantSpec | None:
        """QuantSpec that holds such a matrix without loss; None if only dequantized values do."""
        inputs = self.shape[-1]
        if not self.has_equal_groups or (self.bits <= 4 and inputs % 2) or inputs % (self.group_size or inputs):
            return None
        block = (1 if self.has_row_scales else 0, self.group_size)
        return QuantSpec(
            kind="int4" if self.bits <= 4 else "int8",
            block=block,
            scale=self.scale_dtype,
            zero=self.zero_kind,
            permuted=self.is_permuted,
        )


def stored_integer_weight(
    module: QuantizedModule, layout: IntegerLayout, read: Callable[[int | None], UnpackedIntegers]
) -> StoredWeight:
    """Wraps a module of integers as one weight; ``read`` unpacks all of it, or one entry of its leading axis."""
    spec, dtype = layout.spec, dequantized_dtype(layout.scale_dtype)

    def build(index: int | None) -> Array | QuantizedTensor:
        matrix = read(index)
        check_scales(module, layout.scales_suffix, matrix.scales)
        if layout.zero_kind == "bias" and not np.isfinite(np.asarray(matrix.zeros, np.float32)).all():
            raise module.error("biases holds values that are not finite: the file is damaged")
        return _dequantize(matrix, layout) if spec is None else _to_quantized_tensor(matrix, layout, spec, dtype)

    return module.stored_weight(layout.shape, np.float32 if spec is None else dtype, spec, build)


def unpack_codes(packed: Array, layout: IntegerLayout) -> tuple[Array, bool]:
    """Unpacks the integers of 32-bit words ``[*stack, O, W]`` that are packed along the inputs.

    Returns:
        The integers, and whether they are still packed in pairs because the QuantizedTensor stores them that way.
    """
    packed, inputs = np.ascontiguousarray(packed), layout.shape[-1]
    # Little-endian words of 4-bit integers already have the byte order of pack_nibbles.
    if layout.bits == 4 and layout.spec is not None and not layout.is_permuted:
        return packed.view(np.uint8)[..., : inputs // 2], True
    return unpack_bits(packed, layout.bits, inputs), False


def center_codes(codes: Array, bits: int) -> Array:
    """Subtracts 2^(bits − 1) from unsigned integers, as int8."""
    return (codes ^ np.uint8(0x80)).view(np.int8) if bits == 8 else codes.view(np.int8) - np.int8(1 << (bits - 1))


def has_equal_groups(module: QuantizedModule, suffix: str, num_groups: int) -> bool:
    """Whether a group index (activation order, ``g_idx``) assigns equally many inputs to each group.

    The index is read when a checkpoint is opened, 4 bytes per input, because the answer decides how the weight is
    stored. A damaged index counts as equal: :func:`read_group_index` reports the damage when the weight is loaded.
    """
    group_index = module.read(suffix)
    if group_index.size % num_groups or group_index.min(initial=0) < 0 or group_index.max(initial=0) >= num_groups:
        return group_index.size % num_groups == 0
    return bool((np.bincount(group_index, minlength=num_groups) == group_index.size // num_groups).all())


def read_group_index(module: QuantizedModule, suffix: str, num_groups: int) -> Array:
    """Reads the group of each input, ``int32 [I]``.

    Raises:
        CheckpointError: If a group is out of range.
    """
    group_index = module.read(suffix)
    if group_index.min(initial=0) < 0 or group_index.max(initial=0) >= num_groups:
        raise module.error(f"{suffix} names groups outside 0 .. {num_groups - 1}: the file is damaged")
    return group_index


def _to_quantized_tensor(
    matrix: UnpackedIntegers, layout: IntegerLayout, spec: QuantSpec, dtype: np.dtype[Any]
) -> QuantizedTensor:
    codes, permutation = matrix.codes, None
    if spec.permuted:
        assert matrix.group_index is not None  # a permuted layout always comes with a group index
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
    """Dequantizes to ``float32 [*stack, O, I]`` what no QuantSpec describes."""
    inputs, group_index = layout.shape[-1], matrix.group_index
    group_index = np.arange(inputs) // (layout.group_size or inputs) if group_index is None else group_index
    scales = matrix.scales.astype(np.float32)[..., group_index]
    if layout.zero_kind == "bias":
        return matrix.codes.astype(np.float32) * scales + np.asarray(matrix.zeros, np.float32)[..., group_index]
    middle = np.float32(1 << (layout.bits - 1))
    zero_points = middle if matrix.zeros is None else np.asarray(matrix.zeros, np.float32)[..., group_index]
    return (matrix.codes.astype(np.float32) - zero_points) * scales
