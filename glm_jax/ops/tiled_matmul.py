"""Products with weights in tiles: by kernels, or where there are none with the matrix taken out of its tiles."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from glm_jax.ops.indexing import Index, take_slice
from glm_jax.weights import TiledWeight, Weight
from pallas_kernels import grouped_matmul, kernels_available
from pallas_kernels.quant_matmul import fused_linear
from pallas_kernels.tiles import TILE_WIDTH, Tiles, has_same_layout

_SMALL_BATCH_ROWS = 64
_MIN_BLOCK_OUTPUTS = 32  # outputs of the smallest block that a program works on


def dequantize_slice(weight: TiledWeight, index: tuple[Index, ...]) -> jax.Array:
    """``weight[index]`` in float32."""
    one = jax.tree.map(lambda array: take_slice(array, index), weight.tiles)
    return TiledWeight(one, weight.spec, dtype=weight.dtype, transposed=weight.transposed).to_float32()


def tiled_matmul(rows: jax.Array, weight: TiledWeight, index: tuple[Index, ...]) -> jax.Array:
    """``rows @ weight[index].T`` in float32.

    Args:
        rows: ``[n, I]``.
        weight: ``[*stack, O, I]``.
        index: one per stack axis.

    Returns:
        float32 ``[n, O]``.
    """
    if kernels_available() and not weight.transposed and rows.shape[0] > _SMALL_BATCH_ROWS:
        return grouped_matmul.grouped_matmul(rows, *flatten_stack(weight.tiles, index), dtype=jnp.float32)
    if kernels_available() and not weight.transposed:
        counters = jnp.zeros(
            math.ceil(rows.shape[0] / 16) * (TILE_WIDTH // _MIN_BLOCK_OUTPUTS) * weight.tiles.num_tiles, jnp.int32
        )
        flat, place = flatten_stack(weight.tiles, index)
        made, _ = fused_linear(rows, flat, place, counters, dtype=jnp.float32)
        return made.out
    # The dtype of the activations: what the tensor cores of a GPU multiply.
    matrix = dequantize_slice(weight, index).astype(rows.dtype)
    exact = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        rows, matrix, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def tiled_gate_up(rows: jax.Array, gate: TiledWeight, up: TiledWeight, index: tuple[Index, ...]) -> jax.Array:
    """``silu(rows @ gate[index].T) * (rows @ up[index].T)`` by a kernel; see :func:`can_fuse_gate_up`."""
    flat, place = flatten_stack(gate.tiles, index)
    return grouped_matmul.gated_linear_unit(rows, flat, flatten_stack(up.tiles, index)[0], place)


def can_fuse_gate_up(gate: Weight, up: Weight) -> bool:
    """Whether a kernel can multiply with both matrices at once."""
    if not (isinstance(gate, TiledWeight) and isinstance(up, TiledWeight) and kernels_available()):
        return False
    return not (gate.transposed or up.transposed) and has_same_layout(gate.tiles, up.tiles)


def flatten_stack(tiles: Tiles, index: tuple[Index, ...]) -> tuple[Tiles, jax.Array]:
    """A stack of any number of axes as one of one axis, and the place in it, int32 ``[1]``."""
    sizes = tiles.stack
    place = functools.reduce(lambda at, pair: at * pair[0] + pair[1], zip(sizes, index, strict=True), jnp.int32(0))
    kept = len(sizes)
    flat = jax.tree.map(lambda array: array.reshape(math.prod(sizes), *array.shape[kept:]), tiles)
    return flat, jnp.asarray(place, jnp.int32).reshape(1)
