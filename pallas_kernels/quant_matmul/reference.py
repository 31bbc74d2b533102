"""What the kernels of :mod:`pallas_kernels.quant_matmul` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.op import Made, Squares
from pallas_kernels.tiles import Tiles, from_tiles


def linear_ref(
    x: jax.Array,
    weight: Tiles,
    place: jax.Array,
    *,
    squares: Squares | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    next_norm: jax.Array | None = None,
    next_from: int = 0,
    dtype: Any = None,
    scaled_dtype: Any = None,
) -> Made:
    """See :func:`pallas_kernels.quant_matmul.linear`; sums of squares in one part."""
    one = jax.tree.map(lambda array: array[place[0]], weight)
    rows = x[:, : weight.inputs].astype(jnp.float32)
    out = jnp.matmul(rows, from_tiles(one).T, precision=jax.lax.Precision.HIGHEST)
    if squares is not None:
        out = out * factor_ref(squares, weight.inputs, eps)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    scaled = out.astype(dtype or x.dtype)
    if next_norm is not None:
        scaled = (out * next_norm[place[0] + next_from][None].astype(jnp.float32)).astype(scaled_dtype or x.dtype)
    total = jnp.sum(out * out, axis=-1, keepdims=True)
    return Made(out.astype(dtype or x.dtype), scaled, Squares(total, 0, 1))


def factor_ref(squares: Squares, width: int, eps: float) -> jax.Array:
    """``1 / rms`` of rows ``[M, 1]`` of so many values."""
    mine = squares.parts[:, squares.first : squares.first + squares.count]
    return jax.lax.rsqrt(jnp.sum(mine, axis=-1, keepdims=True) / width + eps)
