"""The fused linear operation in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.quant_matmul.types import LinearOutput, SumSq
from pallas_kernels.tiles import Tiles, dequantize_tiles


def fused_linear_ref(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    counters: jax.Array,
    *,
    second_weight: Tiles | None = None,
    sum_sq: SumSq | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    next_norm: jax.Array | None = None,
    next_norm_offset: int = 0,
    dtype: DTypeLike | None = None,
    scaled_dtype: DTypeLike | None = None,
) -> tuple[LinearOutput, jax.Array]:
    """Reference of :func:`pallas_kernels.quant_matmul.fused_linear`, with the sums of squares in one block."""
    rows = x[:, : weight.inputs].astype(jnp.float32)
    weights = [weight] if second_weight is None else [weight, second_weight]
    out = jnp.concatenate([matmul_ref(rows, w, layer_index[0]) for w in weights], axis=1)
    if sum_sq is not None:
        out = out * inv_rms_ref(sum_sq, weight.inputs, eps)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    scaled = out.astype(dtype or x.dtype)
    if next_norm is not None:
        norm = next_norm[layer_index[0] + next_norm_offset][None].astype(jnp.float32)
        scaled = (out * norm).astype(scaled_dtype or x.dtype)
    total = jnp.sum(out * out, axis=-1, keepdims=True)
    return LinearOutput(out.astype(dtype or x.dtype), scaled, SumSq(total, 0, 1)), counters


def matmul_ref(rows: jax.Array, weight: Tiles, layer: jax.Array) -> jax.Array:
    """Returns ``rows @ weight[layer].T`` as ``float32 [M, N]``, for rows ``float32 [M, K]``."""
    return jnp.matmul(rows, dequantize_layer(weight, layer).T, precision=jax.lax.Precision.HIGHEST)


def dequantize_layer(weight: Tiles, layer: jax.Array) -> jax.Array:
    """Returns the values of one layer of a stack as ``float32 [*stack[1:], N, K]``."""
    return dequantize_tiles(jax.tree.map(lambda array: array[layer], weight))


def inv_rms_ref(sum_sq: SumSq, width: int, eps: float) -> jax.Array:
    """Returns ``1 / rms`` as ``float32 [M, 1]``, for rows of ``width`` values."""
    partials = sum_sq.partials[:, sum_sq.first_block : sum_sq.first_block + sum_sq.num_blocks]
    return jax.lax.rsqrt(jnp.sum(partials, axis=-1, keepdims=True) / width + eps)
