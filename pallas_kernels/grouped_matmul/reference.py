"""The grouped operations in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul.types import RowBlocks
from pallas_kernels.quant_matmul.reference import dequantize_layer
from pallas_kernels.tiles import Tiles

_EXACT = jax.lax.Precision.HIGHEST


def grouped_matmul_ref(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    row_scales: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Reference of :func:`pallas_kernels.grouped_matmul.grouped_matmul`; rows in no block are zero."""
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
    """Reference of :func:`pallas_kernels.grouped_matmul.gated_linear_unit`; rows in no block are zero."""
    gate_out, up_out = (_grouped_product(x, weight, layer_index, blocks, outputs_per_row) for weight in (gate, up))
    return (jax.nn.silu(gate_out) * up_out).astype(x.dtype)


def _grouped_product(
    x: jax.Array, weight: Tiles, layer_index: jax.Array, blocks: RowBlocks | None, outputs_per_row: int
) -> jax.Array:
    """Returns ``float32 [M * outputs_per_row, N]``, computed with every expert and then selected."""
    rows = jnp.repeat(x.astype(jnp.float32), outputs_per_row, axis=0)
    values = dequantize_layer(weight, layer_index[0])
    if blocks is None:
        return jnp.matmul(rows, values.T, precision=_EXACT)
    by_expert = jnp.einsum("mk,enk->men", rows, values, precision=_EXACT)
    row_ids = blocks.row_ids.reshape(-1)
    expert_ids = jnp.broadcast_to(blocks.expert_ids[:, None], blocks.row_ids.shape).reshape(-1)
    destination = jnp.where(row_ids >= 0, row_ids, rows.shape[0])
    expert = jnp.full(rows.shape[0], -1, jnp.int32).at[destination].set(expert_ids, mode="drop")
    selected = jnp.take_along_axis(by_expert, jnp.maximum(expert, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(expert[:, None] >= 0, selected, 0.0)
