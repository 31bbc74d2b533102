"""What the kernels of :mod:`pallas_kernels.grouped_matmul` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.op import RowBlocks
from pallas_kernels.tiles import Tiles, dequantize_tiles

_EXACT = jax.lax.Precision.HIGHEST


def grouped_matmul_ref(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    row_scales: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """See :func:`pallas_kernels.grouped_matmul.grouped_matmul`; rows that are in no block are zero."""
    out = _grouped_product(x, weight, layer_index, blocks, 1)
    out = out if row_scales is None else out * row_scales[:, None]
    return out.astype(dtype or x.dtype)


def gated_linear_unit_ref(
    x: jax.Array,
    gate: Tiles,
    up: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    outputs_per_row: int = 1,
) -> jax.Array:
    """See :func:`pallas_kernels.grouped_matmul.gated_linear_unit`."""
    one, two = (_grouped_product(x, weight, layer_index, blocks, outputs_per_row) for weight in (gate, up))
    return (jax.nn.silu(one) * two).astype(x.dtype)


def _grouped_product(
    x: jax.Array, weight: Tiles, layer_index: jax.Array, blocks: RowBlocks | None, outputs_per_row: int
) -> jax.Array:
    rows = jnp.repeat(x.astype(jnp.float32), outputs_per_row, axis=0)
    values = dequantize_tiles(jax.tree.map(lambda array: array[layer_index[0]], weight))
    if blocks is None:
        return jnp.matmul(rows, values.T, precision=_EXACT)
    every = jnp.einsum("mk,enk->men", rows, values, precision=_EXACT)
    owners = jnp.broadcast_to(blocks.expert_ids[:, None], blocks.row_ids.shape).reshape(-1)
    which = jnp.where(blocks.row_ids.reshape(-1) >= 0, blocks.row_ids.reshape(-1), rows.shape[0])
    expert = jnp.full(rows.shape[0], -1, jnp.int32).at[which].set(owners, mode="drop")
    mine = jnp.take_along_axis(every, jnp.maximum(expert, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(expert[:, None] >= 0, mine, 0.0)
