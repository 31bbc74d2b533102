"""Products with weights in tiles: by kernels, or where there are none with the matrix taken out of its tiles."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from glm_jax.ops.indexing import Index, take
from glm_jax.weights import TiledWeight, Weight
from pallas_kernels import available, grouped_matmul
from pallas_kernels.quant_matmul import linear
from pallas_kernels.tiles import WIDTH, Tiles, same_layout

_FEW_ROWS = 64
_BLOCK = 32  # outputs of the smallest block that a program works on


def values_of(weight: TiledWeight, index: tuple[Index, ...]) -> jax.Array:
    """``weight[index]`` in float32."""
    one = jax.tree.map(lambda array: take(array, index), weight.tiles)
    return TiledWeight(one, weight.spec, dtype=weight.dtype, turned=weight.turned).values()


def matmul(rows: jax.Array, weight: TiledWeight, index: tuple[Index, ...]) -> jax.Array:
    """``rows @ weight[index].T`` in float32.

    Args:
        rows: ``[n, I]``.
        weight: ``[*stack, O, I]``.
        index: one per stack axis.

    Returns:
        float32 ``[n, O]``.
    """
    if available() and not weight.turned and rows.shape[0] > _FEW_ROWS:
        return grouped_matmul.matmul(rows, *flattened(weight.tiles, index), dtype=jnp.float32)
    if available() and not weight.turned:
        counters = jnp.zeros(math.ceil(rows.shape[0] / 16) * (WIDTH // _BLOCK) * weight.tiles.tiles, jnp.int32)
        flat, place = flattened(weight.tiles, index)
        made, _ = linear(rows, flat, place, counters, dtype=jnp.float32)
        return made.out
    # The dtype of the activations: what the tensor cores of a GPU multiply.
    matrix = values_of(weight, index).astype(rows.dtype)
    exact = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        rows, matrix, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def gated(rows: jax.Array, gate: TiledWeight, up: TiledWeight, index: tuple[Index, ...]) -> jax.Array:
    """``silu(rows @ gate[index].T) * (rows @ up[index].T)`` by a kernel; see :func:`together`."""
    flat, place = flattened(gate.tiles, index)
    return grouped_matmul.gated(rows, flat, flattened(up.tiles, index)[0], place)


def together(gate: Weight, up: Weight) -> bool:
    """Whether a kernel can multiply with both matrices at once."""
    if not (isinstance(gate, TiledWeight) and isinstance(up, TiledWeight) and available()):
        return False
    return not (gate.turned or up.turned) and same_layout(gate.tiles, up.tiles)


def flattened(tiles: Tiles, index: tuple[Index, ...]) -> tuple[Tiles, jax.Array]:
    """A stack of any number of axes as one of one axis, and the place in it, int32 ``[1]``."""
    sizes = tiles.stack
    place = functools.reduce(lambda at, pair: at * pair[0] + pair[1], zip(sizes, index, strict=True), jnp.int32(0))
    kept = len(sizes)
    flat = jax.tree.map(lambda array: array.reshape(math.prod(sizes), *array.shape[kept:]), tiles)
    return flat, jnp.asarray(place, jnp.int32).reshape(1)
