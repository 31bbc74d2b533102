"""Random arrays of any size, element by element from a hash of their place: nothing is held but the result."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tiles import BITS_PER_QVALUE, CHUNK_ROWS, TILE_WIDTH, Tiles, WeightKind, chunk_inputs

# Root mean square of what uniformly random codes stand for, before the scale (see :func:`_random_packed`).
_QVALUE_RMS = {"int4": 17.5**0.5, "uint4": 21.25**0.5, "int8": 73.9, "uint8": 73.9, "fp8": 0.598, "fp4": 8.5625**0.5}
_QVALUE_MEAN = {"uint4": 7.5, "uint8": 127.5}


def mix_bits(x: Any) -> Any:
    """A bijective 32-bit mix (the "lowbias32" constants of https://github.com/skeeto/hash-prospector)."""
    kind = np.uint32
    x = (x ^ (x >> kind(16))) * kind(0x7FEB352D)
    x = (x ^ (x >> kind(15))) * kind(0x846CA68B)
    return x ^ (x >> kind(16))


def random_bits(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Random uint32; inside ``jit`` XLA makes them where they are used."""
    inner = shape[1:] if len(shape) > 1 else shape
    place = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(_strides(inner), len(shape) - len(inner)):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % (1 << 32))
    first = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) if len(shape) > 1 else jnp.zeros(shape, jnp.uint32)
    return mix_bits(place ^ mix_bits(first + np.uint32((seed * 0x9E3779B9 + 1) % (1 << 32))))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def random_normal(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32, std: float = 1.0) -> jax.Array:
    """Nearly normal values: the centered sum of four bytes, whose variance is (256^2 - 1) / 3."""
    x = random_bits(shape, seed)
    parts = [(x >> np.uint32(8 * i)) & np.uint32(255) for i in range(4)]
    total = (parts[0] + parts[1] + parts[2] + parts[3]).astype(jnp.float32)
    return ((total - jnp.float32(510)) * jnp.float32(std / math.sqrt((256**2 - 1) / 3))).astype(dtype)


def random_tiles(
    shape: tuple[int, ...],
    kind: WeightKind,
    group_size: int = 0,
    *,
    seed: int,
    std: float | None = None,
    scale_dtype: Any = jnp.bfloat16,
    num_input_scale_sets: int = 0,
) -> Tiles:
    """A weight ``[*stack, N, K]`` in tiles with random codes, and scales that give its values about the size asked for.

    Args:
        shape: of the weight.
        kind: of the codes.
        group_size: inputs that share a scale; 0 for all of them.
        seed: of codes and scales.
        std: standard deviation of the values; one over the root of the inputs unless given.
        scale_dtype: dtype of the scales.
        num_input_scale_sets: sets of factors of the inputs, in place of scales.
    """
    *stack, outputs, inputs = shape
    deviation = inputs**-0.5 if std is None else std
    columns, chunks = -(-outputs // TILE_WIDTH), -(-inputs // chunk_inputs(kind))
    words = _random_packed((*stack, columns, chunks, CHUNK_ROWS, TILE_WIDTH), kind, seed, deviation)
    made: dict[str, Any] = {"kind": kind, "outputs": outputs, "inputs": inputs, "group_size": group_size}
    if BITS_PER_QVALUE[kind] >= 16:
        return Tiles(words, **made)
    unit = deviation / _QVALUE_RMS[kind]

    def scales(*shape: int) -> jax.Array:
        spread = random_bits((*stack, *shape), seed + 1).astype(jnp.float32) / jnp.float32(1 << 32)
        return ((spread + jnp.float32(0.5)) * jnp.float32(unit)).astype(scale_dtype)

    if num_input_scale_sets:
        return Tiles(words, input_scales=scales(num_input_scale_sets, inputs), **made)
    by_tile = scales(columns, -(-chunks * chunk_inputs(kind) // group_size) if group_size else 1, TILE_WIDTH)
    offsets = None if kind not in _QVALUE_MEAN else by_tile.astype(jnp.float32) * jnp.float32(-_QVALUE_MEAN[kind])
    return Tiles(words, by_tile, offsets, **made)


def random_cache_rows(shape: tuple[int, ...], kind: str, seed: int) -> tuple[jax.Array, jax.Array | None]:
    """Rows of a latent cache ``[..., R + P]`` of normal or uniform values of size 1: codes, and scales ``[..., 2]``.

    Args:
        shape: of the codes.
        kind: "bfloat16", "float32", "int8" or "fp8".
        seed: of the values.
    """
    if kind not in ("int8", "fp8"):
        return random_normal(shape, seed, kind), None
    codes = (random_bits(shape, seed) >> np.uint32(24)).astype(jnp.uint8)
    if kind == "fp8":
        codes = codes & np.uint8(0xBF)
    else:
        codes = jax.lax.bitcast_convert_type(codes, jnp.int8)
    return codes, jnp.full((*shape[:-1], 2), 1 / _QVALUE_RMS[kind], jnp.float32)


def _random_packed(shape: tuple[int, ...], kind: str, seed: int, size: float) -> jax.Array:
    """Words of random codes with a mean near zero, none of them NaN."""
    if kind == "bfloat16":
        low, high = (
            jax.lax.bitcast_convert_type(random_normal(shape, seed + i, jnp.bfloat16, size), jnp.uint16).astype(
                jnp.uint32
            )
            for i in (0, 1)
        )
        return low | (high << np.uint32(16))
    if kind == "float32":
        return jax.lax.bitcast_convert_type(random_normal(shape, seed, std=size), jnp.uint32)
    x = random_bits(shape, seed)
    if kind == "int4":
        # -7 to 7: a code of 0, which is -8, becomes 8, which is 0.
        some = x | (x >> np.uint32(1)) | (x >> np.uint32(2)) | (x >> np.uint32(3))
        return x | ((~some & np.uint32(0x11111111)) << np.uint32(3))
    return x & np.uint32(0xBFBFBFBF) if kind == "fp8" else x  # magnitudes below 2: no bits of a NaN
