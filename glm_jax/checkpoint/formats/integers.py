"""Unpacked integers with scales and zero points, stored again as QuantizedTensors: one way for all integer formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.base import Array, Module, Stored, check_scales, values_dtype
from glm_jax.checkpoint.formats.bit_packing import unpack
from glm_jax.weights import QuantizedTensor, QuantSpec, pack_nibbles
from glm_jax.weights.quant_spec import ScaleKind, Zero


@dataclasses.dataclass(frozen=True, slots=True)
class Integers:
    """A matrix of unsigned codes, before it is packed again.

    Attributes:
        codes: uint8 ``[*stack, O, I]``, 0 .. 2^bits − 1; or two to a byte, the even column in the low half.
        scales: ``[*stack, O, G]``.
        zeros: zero points or biases like the scales; None when all zero points are 2^(bits − 1).
        groups: of each column, int ``[I]``, or None for ``column // group``.
        nibbles: whether there are two codes to a byte.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    groups: Array | None = None
    nibbles: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What headers and configuration say about a matrix of integers.

    Attributes:
        shape: ``[*stack, O, I]``.
        bits: of a code as stored.
        group: inputs that share a scale; 0 for all.
        scale: dtype of the scales, as a QuantSpec calls it.
        zero: what there is beside them.
        permuted: whether columns belong to groups in another order than their own.
        regular: whether the groups are equally large.
        row_scales: whether each output has scales of its own (else one serves all).
        scales: name of their tensor, for messages.
    """

    shape: tuple[int, ...]
    bits: int
    group: int
    scale: ScaleKind
    zero: Zero = "none"
    permuted: bool = False
    regular: bool = True
    row_scales: bool = True
    scales: str = "scales"

    @property
    def spec(self) -> QuantSpec | None:
        """How such a matrix is stored here; None if only dense values keep it without loss."""
        inputs = self.shape[-1]
        if not self.regular or (self.bits <= 4 and inputs % 2) or inputs % (self.group or inputs):
            return None
        block = (1 if self.row_scales else 0, self.group)
        return QuantSpec(
            kind="int4" if self.bits <= 4 else "int8",
            block=block,
            scale=self.scale,
            zero=self.zero,
            permuted=self.permuted,
        )


def stored_integers(module: Module, layout: Layout, read: Callable[[int | None], Integers]) -> Stored:
    """The weight; ``read`` unpacks it, or one row of its stack."""
    spec, dtype = layout.spec, values_dtype(layout.scale)

    def build(row: int | None) -> Array | QuantizedTensor:
        matrix = read(row)
        check_scales(module, layout.scales, matrix.scales)
        if layout.zero == "bias" and not np.isfinite(np.asarray(matrix.zeros, np.float32)).all():
            raise module.error("biases holds values that are not finite: the file is damaged")
        return _dense(matrix, layout) if spec is None else _packed(matrix, layout, spec, dtype)

    return module.stored(layout.shape, np.float32 if spec is None else dtype, spec, build)


def unpack_codes(words: Array, layout: Layout) -> tuple[Array, bool]:
    """Codes of words packed along the inputs, and whether they are two to a byte, as they are to be stored."""
    words, inputs = np.ascontiguousarray(words), layout.shape[-1]
    # 4 bits in little-endian words are in the order of pack_nibbles already.
    if layout.bits == 4 and layout.spec is not None and not layout.permuted:
        return words.view(np.uint8)[..., : inputs // 2], True
    return unpack(words, layout.bits, inputs), False


def centred(codes: Array, bits: int) -> Array:
    """Codes around 2^(bits − 1) as int8 around 0."""
    return (codes ^ np.uint8(0x80)).view(np.int8) if bits == 8 else codes.view(np.int8) - np.int8(1 << (bits - 1))


def _packed(matrix: Integers, layout: Layout, spec: QuantSpec, dtype: np.dtype[Any]) -> QuantizedTensor:
    codes, permutation = matrix.codes, None
    if spec.permuted:
        assert matrix.groups is not None  # the layout says permuted only where there are groups
        permutation = np.argsort(matrix.groups, kind="stable").astype(np.int32)
        codes = np.take(codes, permutation, axis=-1)
    if matrix.nibbles:
        pass
    elif spec.kind == "int4":
        shift = 8 - (1 << (layout.bits - 1)) if spec.zero == "none" else 0
        codes = pack_nibbles(codes + np.uint8(shift) if shift else codes)
    elif spec.zero == "none":
        codes = centred(np.ascontiguousarray(codes), layout.bits)
    zeros = matrix.zeros
    if spec.zero == "point":
        assert zeros is not None
        zeros = np.ascontiguousarray(zeros, np.uint8 if spec.kind == "int4" else np.int16)
    scales = np.ascontiguousarray(matrix.scales)
    parts = {"zeros": zeros if spec.zero != "none" else None, "permutation": permutation}
    return QuantizedTensor(np.ascontiguousarray(codes), scales, **parts, spec=spec, dtype=dtype)


def _dense(matrix: Integers, layout: Layout) -> Array:
    """Values in float32, for what no QuantSpec describes."""
    inputs = layout.shape[-1]
    groups = np.arange(inputs) // (layout.group or inputs) if matrix.groups is None else matrix.groups
    scales = matrix.scales.astype(np.float32)[..., groups]
    if layout.zero == "bias":
        return matrix.codes.astype(np.float32) * scales + np.asarray(matrix.zeros, np.float32)[..., groups]
    middle = np.float32(1 << (layout.bits - 1))
    points = middle if matrix.zeros is None else np.asarray(matrix.zeros, np.float32)[..., groups]
    return (matrix.codes.astype(np.float32) - points) * scales
