"""Products with weights in plain JAX: :func:`linear` and :func:`per_head_linear`.

A weight may be a stack (layers, experts) from which an index picks one matrix. The whole stack and the index go into
the product, so that it reads nothing but the one matrix. How a weight is stored is the business of
:class:`glm_jax.weights.WeightMatrix`.

LoRA is a storage too: a subclass of ``WeightMatrix``, whose docstring says what it needs. The fused decode step and the
batched experts do not call these functions, so a term that is added here would be missing there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.weights import Weight, as_weight_matrix
from glm_jax.weights.dense_matmul import einsum_f32 as einsum_f32
from glm_jax.weights.indexing import Index as Index


def index_weight(weight: Weight, *index: Index) -> jax.Array:
    """``weight[index]`` with traced indices on the leading axes, as an array to compute with.

    Plain arrays keep their dtype. Other storages are dequantized as a whole, to float32: products go through
    :func:`linear`, which does not do that.
    """
    return as_weight_matrix(weight).values(index)


def linear(x: jax.Array, weight: Weight, *index: Index, dtype: jnp.dtype | None = None) -> jax.Array:
    """``x @ weight[index].T``, accumulated in float32.

    Args:
        x: ``[..., I]``.
        weight: ``[*stack, O, I]``, the orientation of checkpoints.
        index: One entry per stack axis.
        dtype: Dtype of the result, that of ``x`` by default.

    Returns:
        ``[..., O]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = as_weight_matrix(weight).matmul(rows, index)
    return product.reshape(*x.shape[:-1], product.shape[1]).astype(dtype or x.dtype)


def per_head_linear(x: jax.Array, weight: Weight, *index: Index, transpose: bool = False) -> jax.Array:
    """One product per head: ``out[..., n, :] = weight[index][n] @ x[..., n, :]`` (``weight[index][n].T`` transposed).

    Args:
        x: ``[..., N, I]``, or ``[..., N, O]`` with ``transpose``.
        weight: ``[*stack, N, O, I]``.
        index: One entry per stack axis.
        transpose: Multiply with the transposed matrices.

    Returns:
        ``[..., N, O]``, or ``[..., N, I]`` with ``transpose``, in the dtype of ``x``.
    """
    return as_weight_matrix(weight).per_head_matmul(x, index, transpose=transpose).astype(x.dtype)


@jax.named_scope("embed")
def embed_tokens(table: Weight, tokens: jax.Array, first_row: Index = 0) -> jax.Array:
    """Rows of an embedding table; zeros for tokens whose row is not in this part of the table.

    Args:
        table: ``[V, D]``, or the rows from ``first_row`` on that this device holds.
        tokens: ``int32 [...]``.
        first_row: Token id of the first row of ``table``.

    Returns:
        ``[..., D]`` in the table's dtype.
    """
    local = tokens - first_row
    in_table = (local >= 0) & (local < table.shape[0])
    values = as_weight_matrix(table).gather(jnp.where(in_table, local, 0))
    return jnp.where(in_table[..., None], values, jnp.zeros((), values.dtype)).astype(table.dtype)
