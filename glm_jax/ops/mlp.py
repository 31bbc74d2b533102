"""The gated feed-forward network (SwiGLU, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.ops.linear import Index, linear
from glm_jax.weights import Weight, as_weight_matrix


def swiglu(
    x: jax.Array, gate: Weight, up: Weight, down: Weight, *index: Index, dtype: jnp.dtype | None = None
) -> jax.Array:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T``.

    Args:
        x: ``[..., D]``.
        gate: ``[*stack, F, D]``.
        up: ``[*stack, F, D]``.
        down: ``[*stack, D, F]``.
        index: One entry per stack axis.
        dtype: Dtype of the result, that of ``x`` by default.

    Returns:
        ``[..., D]``.
    """
    gate_matrix, up_matrix = as_weight_matrix(gate), as_weight_matrix(up)
    if gate_matrix.can_fuse_gate_up(up_matrix):
        rows = gate_matrix.fused_gate_up(x.reshape(-1, x.shape[-1]), up_matrix, index)
        hidden = rows.reshape(*x.shape[:-1], -1)
    else:
        hidden = jax.nn.silu(linear(x, gate, *index)) * linear(x, up, *index)
    return linear(hidden, down, *index, dtype=dtype)
