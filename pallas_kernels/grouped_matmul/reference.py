"""What the kernels of :mod:`pallas_kernels.grouped_matmul` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.op import Blocks
from pallas_kernels.tiles import Tiles, from_tiles

_EXACT = jax.lax.Precision.HIGHEST


def matmul_ref(
    x: jax.Array,
    weight: Tiles,
    place: jax.Array,
    *,
    blocks: Blocks | None = None,
    factors: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """See :func:`pallas_kernels.grouped_matmul.matmul`; rows that are in no block are zero."""
    out = _product(x, weight, place, blocks, 1)
    out = out if factors is None else out * factors[:, None]
    return out.astype(dtype or x.dtype)


def gated_ref(
    x: jax.Array, gate: Tiles, up: Tiles, place: jax.Array, *, blocks: Blocks | None = None, chosen: int = 1
) -> jax.Array:
    """See :func:`pallas_kernels.grouped_matmul.gated`."""
    one, two = (_product(x, weight, place, blocks, chosen) for weight in (gate, up))
    return (jax.nn.silu(one) * two).astype(x.dtype)


def _product(x: jax.Array, weight: Tiles, place: jax.Array, blocks: Blocks | None, chosen: int) -> jax.Array:
    rows = jnp.repeat(x.astype(jnp.float32), chosen, axis=0)
    values = from_tiles(jax.tree.map(lambda array: array[place[0]], weight))
    if blocks is None:
        return jnp.matmul(rows, values.T, precision=_EXACT)
    every = jnp.einsum("mk,enk->men", rows, values, precision=_EXACT)
    owners = jnp.broadcast_to(blocks.owners[:, None], blocks.rows.shape).reshape(-1)
    which = jnp.where(blocks.rows.reshape(-1) >= 0, blocks.rows.reshape(-1), rows.shape[0])
    expert = jnp.full(rows.shape[0], -1, jnp.int32).at[which].set(owners, mode="drop")
    mine = jnp.take_along_axis(every, jnp.maximum(expert, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(expert[:, None] >= 0, mine, 0.0)
