"""Random arrays of any size, each element a hash of its index: nothing is stored but the result."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.tiles import BITS_PER_QVALUE, CHUNK_ROWS, TILE_WIDTH, Tiles, WeightKind, chunk_inputs

# Root mean square of the values of uniformly random qvalues, before the scale (see :func:`_random_packed`).
_QVALUE_RMS = {"int4": 17.5**0.5, "uint4": 21.25**0.5, "int8": 73.9, "uint8": 73.9, "fp8": 0.598, "fp4": 8.5625**0.5}
_QVALUE_MEAN = {"uint4": 7.5, "uint8": 127.5}
Uint32 = TypeVar("Uint32", jax.Array, np.ndarray, np.uint32)


def mix_bits(x: Uint32) -> Uint32:
    """Applies a bijective 32-bit hash (the "lowbias32" constants of https://github.com/skeeto/hash-prospector)."""
    kind = np.uint32
    x = (x ^ (x >> kind(16))) * kind(0x7FEB352D)
    x = (x ^ (x >> kind(15))) * kind(0x846CA68B)
    return x ^ (x >> kind(16))


def random_bits(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Returns random ``uint32`` of a shape. Inside ``jit`` XLA computes them where they are used."""
    inner = shape[1:] if len(shape) > 1 else shape
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(_strides(inner), len(shape) - len(inner)):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % (1 << 32))
    first = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) if len(shape) > 1 else jnp.zeros(shape, jnp.uint32)
    return mix_bits(index ^ mix_bits(first + np.uint32((seed * 0x9E3779B9 + 1) % (1 << 32))))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def random_normal(shape: tuple[int, ...], seed: int, dtype: DTypeLike = jnp.float32, std: float = 1.0) -> jax.Array:
    """Returns nearly normal values: the centered sum of four bytes, whose variance is (256^2 - 1) / 3."""
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
    scale_dtype: DTypeLike = jnp.bfloat16,
    num_input_scale_sets: int = 0,
) -> Tiles:
    """Returns a weight ``[*stack, N, K]`` in tiles, with random qvalues and scales that give its values ``std``.

    Args:
        shape: Shape of the weight.
        kind: Kind of the qvalues.
        group_size: Inputs that share a scale; 0 if all do.
        seed: Seed of qvalues and scales.
        std: Standard deviation of the values; ``K ** -0.5`` by default.
        scale_dtype: Dtype of the scales.
        num_input_scale_sets: Sets of scales of the inputs, in place of scales of the outputs; 0 for none.
    """
    *stack, outputs, inputs = shape
    deviation = inputs**-0.5 if std is None else std
    tiles, chunks = -(-outputs // TILE_WIDTH), -(-inputs // chunk_inputs(kind))
    packed = _random_packed((*stack, tiles, chunks, CHUNK_ROWS, TILE_WIDTH), kind, seed, deviation)
    weight = Tiles(packed, kind=kind, outputs=outputs, inputs=inputs, group_size=group_size)
    if BITS_PER_QVALUE[kind] >= 16:
        return weight
    unit = deviation / _QVALUE_RMS[kind]

    def scales(*shape: int) -> jax.Array:
        spread = random_bits((*stack, *shape), seed + 1).astype(jnp.float32) / jnp.float32(1 << 32)
        return ((spread + jnp.float32(0.5)) * jnp.float32(unit)).astype(scale_dtype)

    if num_input_scale_sets:
        return dataclasses.replace(weight, input_scales=scales(num_input_scale_sets, inputs))
    by_tile = scales(tiles, -(-chunks * chunk_inputs(kind) // group_size) if group_size else 1, TILE_WIDTH)
    offsets = None if kind not in _QVALUE_MEAN else by_tile.astype(jnp.float32) * jnp.float32(-_QVALUE_MEAN[kind])
    return dataclasses.replace(weight, scales=by_tile, offsets=offsets)


def random_cache_rows(shape: tuple[int, ...], kind: str, seed: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns rows of a latent cache ``[..., R + P]`` with values of size 1, and their scales ``float32 [..., 2]``.

    Args:
        shape: Shape of the rows.
        kind: "bfloat16" or "float32" for values, "int8" or "fp8" for qvalues with scales.
        seed: Seed of the values.
    """
    if kind not in ("int8", "fp8"):
        return random_normal(shape, seed, kind), None
    qvalues = (random_bits(shape, seed) >> np.uint32(24)).astype(jnp.uint8)
    if kind == "fp8":
        qvalues = qvalues & np.uint8(0xBF)
    else:
        qvalues = jax.lax.bitcast_convert_type(qvalues, jnp.int8)
    return qvalues, jnp.full((*shape[:-1], 2), 1 / _QVALUE_RMS[kind], jnp.float32)


def _random_packed(shape: tuple[int, ...], kind: str, seed: int, std: float) -> jax.Array:
    """Returns packed words of random qvalues with a mean near zero and no NaN."""
    if kind == "bfloat16":
        low, high = (
            jax.lax.bitcast_convert_type(random_normal(shape, seed + i, jnp.bfloat16, std), jnp.uint16).astype(
                jnp.uint32
            )
            for i in (0, 1)
        )
        return low | (high << np.uint32(16))
    if kind == "float32":
        return jax.lax.bitcast_convert_type(random_normal(shape, seed, std=std), jnp.uint32)
    x = random_bits(shape, seed)
    if kind == "int4":
        # -7 to 7: a qvalue of 0, which is -8, becomes 8, which is 0.
        is_set = x | (x >> np.uint32(1)) | (x >> np.uint32(2)) | (x >> np.uint32(3))
        return x | ((~is_set & np.uint32(0x11111111)) << np.uint32(3))
    return x & np.uint32(0xBFBFBFBF) if kind == "fp8" else x  # magnitudes below 2 exclude the bits of NaN
