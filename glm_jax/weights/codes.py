"""Stored codes to values and back, on NumPy and JAX arrays alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.weights.quant_spec import QuantSpec

Array = Any  # np.ndarray or jax.Array

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def array_namespace(array: Array) -> Any:
    """``numpy`` or ``jax.numpy``, whichever computes with this array."""
    return np if isinstance(array, np.ndarray) else jnp


def pack_nibbles(codes: Array) -> Array:
    """Packs codes 0 .. 15 ``[..., I]`` in pairs, ``uint8 [..., I/2]``: the even column in the low half of a byte."""
    xp = array_namespace(codes)
    low, high = codes[..., 0::2].astype(xp.uint8), codes[..., 1::2].astype(xp.uint8)
    return low | (high << xp.uint8(4))


def unpack_nibbles(packed: Array) -> Array:
    """Unpacks ``uint8 [..., I/2]`` to codes ``uint8 [..., I]``; the inverse of :func:`pack_nibbles`."""
    xp = array_namespace(packed)
    halves = xp.stack([packed & xp.uint8(15), packed >> xp.uint8(4)], axis=-1)
    return halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def decode_e4m3(codes: Array) -> Array:
    """float32 values of float8 e4m3fn bit patterns, which must not be one of the two NaNs.

    The same bits, shifted into a float16, represent the value times 2^-8, subnormal numbers included. So there is no
    table and no branch.
    """
    xp = array_namespace(codes)
    wide = codes.astype(xp.uint16)
    half = ((wide & xp.uint16(0x80)) << xp.uint16(8)) | ((wide & xp.uint16(0x7F)) << xp.uint16(7))
    return _bitcast_float16(half).astype(xp.float32) * xp.float32(256)


def decode_e2m1(codes: Array) -> Array:
    """float32 values of 4-bit floats, one code 0 .. 15 per element.

    The same bits, shifted into a float16, represent the value times 2^-14.
    """
    xp = array_namespace(codes)
    wide = codes.astype(xp.uint16)
    half = ((wide & xp.uint16(8)) << xp.uint16(12)) | ((wide & xp.uint16(7)) << xp.uint16(9))
    return _bitcast_float16(half).astype(xp.float32) * xp.float32(16384)


def decode_e8m0(codes: Array) -> Array:
    """float32 powers of two ``2^(u - 127)`` of codes ``u``, which must not be 255 (NaN)."""
    xp = array_namespace(codes)
    wide = codes.astype(xp.uint32)
    bits = xp.where(wide == 0, xp.uint32(1 << 22), wide << xp.uint32(23))
    return bits.view(np.float32) if xp is np else jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bitcast_float16(bits: Array) -> Array:
    return bits.view(np.float16) if isinstance(bits, np.ndarray) else jax.lax.bitcast_convert_type(bits, jnp.float16)


def decode_planes(codes: Array, spec: QuantSpec) -> list[Array]:
    """float32 values of the codes, before scale and zero point, one array for each code of a byte."""
    xp = array_namespace(codes)
    if spec.kind == "int8":
        return [codes.astype(xp.float32)]
    if spec.kind == "fp8":
        return [decode_e4m3(codes)]
    halves = [codes & xp.uint8(15), codes >> xp.uint8(4)]
    if spec.kind == "fp4":
        return [decode_e2m1(half) for half in halves]
    offset = xp.float32(8 if spec.zero == "none" else 0)
    return [half.astype(xp.float32) - offset for half in halves]


def expand_planes(blocks: Array, spec: QuantSpec, shape: tuple[int, ...]) -> list[Array]:
    """Repeats one value per block to one per stored code, for each code of a byte.

    An axis that a single block spans keeps size 1. Where all planes are equal, the list has one array.

    Args:
        blocks: ``[*stack, ceil(O/rows), ceil(I/columns)]``.
        spec: Its ``block`` is ``(rows, columns)``.
        shape: Shape of the weight, ``[*stack, O, I]``.
    """
    (rows, columns), count = spec.block, spec.values_per_byte
    if rows > 1 and blocks.shape[-2] > 1:
        blocks = _repeat(blocks, rows, -2)[..., : shape[-2], :]
    if blocks.shape[-1] == 1:
        return [blocks]
    if columns % count == 0:
        return [_repeat(blocks, columns // count, -1)[..., : shape[-1] // count]]
    wide = _repeat(blocks, columns, -1)[..., : shape[-1]]
    return [wide[..., i::count] for i in range(count)]


def _repeat(array: Array, count: int, axis: int) -> Array:
    return array if count == 1 else array_namespace(array).repeat(array, count, axis=axis)
