"""What the kernels of :mod:`pallas_kernels.quant_matmul` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.op import LinearOutput, SumSq
from pallas_kernels.tiles import Tiles, dequantize_tiles


def fused_linear_ref(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    *,
    sum_sq: SumSq | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    next_norm: jax.Array | None = None,
    next_norm_offset: int = 0,
    dtype: Any = None,
    scaled_dtype: Any = None,
) -> LinearOutput:
    """See :func:`pallas_kernels.quant_matmul.fused_linear`; sums of squares in one part."""
    one = jax.tree.map(lambda array: array[layer_index[0]], weight)
    rows = x[:, : weight.inputs].astype(jnp.float32)
    out = jnp.matmul(rows, dequantize_tiles(one).T, precision=jax.lax.Precision.HIGHEST)
    if sum_sq is not None:
        out = out * inv_rms_ref(sum_sq, weight.inputs, eps)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    scaled = out.astype(dtype or x.dtype)
    if next_norm is not None:
        scaled = (out * next_norm[layer_index[0] + next_norm_offset][None].astype(jnp.float32)).astype(
            scaled_dtype or x.dtype
        )
    total = jnp.sum(out * out, axis=-1, keepdims=True)
    return LinearOutput(out.astype(dtype or x.dtype), scaled, SumSq(total, 0, 1))


def inv_rms_ref(sum_sq: SumSq, width: int, eps: float) -> jax.Array:
    """``1 / rms`` of rows ``[M, 1]`` of so many values."""
    mine = sum_sq.partials[:, sum_sq.first_block : sum_sq.first_block + sum_sq.num_blocks]
    return jax.lax.rsqrt(jnp.sum(mine, axis=-1, keepdims=True) / width + eps)
