"""Codes to values and back, on NumPy and JAX arrays alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # np.ndarray or jax.Array

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def array_namespace(array: Array) -> Any:
    """The module, NumPy or ``jax.numpy``, that computes with an array."""
    return np if isinstance(array, np.ndarray) else jnp


def pack_nibbles(codes: Array) -> Array:
    """Codes 0 .. 15 ``[..., I]`` two to a byte ``[..., I/2]``: the even column in the low half."""
    xp = array_namespace(codes)
    low, high = codes[..., 0::2].astype(xp.uint8), codes[..., 1::2].astype(xp.uint8)
    return low | (high << xp.uint8(4))


def unpack_nibbles(packed: Array) -> Array:
    """The inverse of :func:`pack_nibbles`: uint8 ``[..., I]``."""
    xp = array_namespace(packed)
    halves = xp.stack([packed & xp.uint8(15), packed >> xp.uint8(4)], axis=-1)
    return halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def decode_e4m3(codes: Array) -> Array:
    """float32 values of float8 e4m3fn bit patterns (the two NaN patterns must not occur).

    As float16 the same bits, moved, stand for the value times 2^-8, subnormal numbers included; so there is no table
    and no branch.
    """
    xp = array_namespace(codes)
    wide = codes.astype(xp.uint16)
    half = ((wide & xp.uint16(0x80)) << xp.uint16(8)) | ((wide & xp.uint16(0x7F)) << xp.uint16(7))
    return _bitcast_float16(half).astype(xp.float32) * xp.float32(256)


def decode_e2m1(codes: Array) -> Array:
    """float32 values of 4-bit floats, one code 0 .. 15 per element; as float16 the same bits stand for 2^-14 of it."""
    xp = array_namespace(codes)
    wide = codes.astype(xp.uint16)
    half = ((wide & xp.uint16(8)) << xp.uint16(12)) | ((wide & xp.uint16(7)) << xp.uint16(9))
    return _bitcast_float16(half).astype(xp.float32) * xp.float32(16384)


def decode_e8m0(codes: Array) -> Array:
    """float32 powers of two ``2^(u - 127)`` (255 is NaN and must not occur)."""
    xp = array_namespace(codes)
    wide = codes.astype(xp.uint32)
    bits = xp.where(wide == 0, xp.uint32(1 << 22), wide << xp.uint32(23))
    return bits.view(np.float32) if xp is np else jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bitcast_float16(bits: Array) -> Array:
    return bits.view(np.float16) if isinstance(bits, np.ndarray) else jax.lax.bitcast_convert_type(bits, jnp.float16)
