"""Rotary position embedding (https://arxiv.org/abs/2104.09864) of the rope part of queries and keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_table(positions: jax.Array, width: int, theta: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of ``position * theta^(-2j / width)``.

    Both are computed in float32 and cast to the activations' dtype, as transformers does.

    Args:
        positions: ``int32 [...]``.
        width: P, the width of the rope part.
        theta: Base of the frequencies.
        dtype: Dtype of the result.

    Returns:
        Cosines and sines, ``[..., P/2]`` each.
    """
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(theta**-exponents, tuple(range(positions.ndim)))
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleave: bool) -> jax.Array:
    """Rotates pairs of the last axis of ``x`` by the table's angles.

    Pairs are adjacent, (x[2j], x[2j+1]), with ``interleave`` (GLM-4.7-Flash), else (x[j], x[j + P/2]). They keep their
    columns, whereas transformers moves them; scores are the same because queries and keys agree.

    Args:
        x: ``[..., P]``.
        cos: Broadcasts against ``[..., P/2]``.
        sin: Broadcasts against ``[..., P/2]``.
        interleave: Which columns form a pair.

    Returns:
        ``[..., P]``.
    """
    if interleave:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    rotated = first * cos - second * sin, first * sin + second * cos
    if interleave:
        return jnp.stack(rotated, axis=-1).reshape(x.shape)
    return jnp.concatenate(rotated, axis=-1)
