"""The gated feed-forward network (SwiGLU)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.ops import tiled_matmul
from glm_jax.ops.linear import Index, linear
from glm_jax.weights import TiledWeight, Weight


def swiglu(
    x: jax.Array, gate: Weight, up: Weight, down: Weight, *index: Index, dtype: jnp.dtype | None = None
) -> jax.Array:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T``.

    Args:
        x: ``[..., D]``.
        gate: ``[*stack, F, D]``; ``up`` the same; ``down`` ``[*stack, D, F]``.
        index: one per stack axis.
        dtype: of the result; that of ``x`` unless given.
    """
    if isinstance(gate, TiledWeight) and isinstance(up, TiledWeight) and tiled_matmul.can_fuse_gate_up(gate, up):
        rows = tiled_matmul.tiled_gate_up(x.reshape(-1, x.shape[-1]), gate, up, index)
        return linear(rows.reshape(*x.shape[:-1], -1), down, *index, dtype=dtype)
    hidden = jax.nn.silu(linear(x, gate, *index)) * linear(x, up, *index)
    return linear(hidden, down, *index, dtype=dtype)
