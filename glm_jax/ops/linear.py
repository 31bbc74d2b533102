"""Products with weights: the one place that knows how a weight is stored.

A weight may be a stack (layers, experts) from which an index picks one matrix. The whole stack and the index go into
the product, so that nothing but the rows being multiplied is read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.ops import tiled_matmul
from glm_jax.ops.indexing import Index as Index
from glm_jax.ops.indexing import take_slice
from glm_jax.ops.quantized_matmul import gather_rows, per_head_quantized_matmul, quantized_matmul, slice_quantized
from glm_jax.weights import Bfloat16Bits, QuantizedTensor, TiledWeight, Weight, dequantize

_FUSED_WIDTH = 2560  # divides the long widths of GLM-4.7-Flash, 5,120 and 10,240; 16 kB would be 4,096
_SMALL_BATCH_ROWS = 256


def index_weight(weight: Weight, *index: Index) -> jax.Array:
    """``weight[index]`` with traced indices on the leading axes, in a dtype to compute with.

    Bits and quantized weights become float32 as a whole: products go through :func:`linear`, which does not.
    """
    if isinstance(weight, QuantizedTensor):
        return dequantize(slice_quantized(weight, index))
    if isinstance(weight, TiledWeight):
        return tiled_matmul.dequantize_slice(weight, index)
    if isinstance(weight, Bfloat16Bits):
        return Bfloat16Bits(take_slice(weight.bits, index)).to_float32()
    return take_slice(weight, index)


def linear(x: jax.Array, weight: Weight, *index: Index, dtype: jnp.dtype | None = None) -> jax.Array:
    """``x @ weight[index].T``, accumulated in float32.

    Args:
        x: ``[..., I]``.
        weight: ``[*stack, O, I]``, as checkpoints store it.
        index: one per stack axis.
        dtype: of the result; that of ``x`` unless given.

    Returns:
        ``[..., O]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, QuantizedTensor):
        product = quantized_matmul(rows, weight, index)
    elif isinstance(weight, TiledWeight):
        product = tiled_matmul.tiled_matmul(rows, weight, index)
    elif rows.shape[0] == 1 and any(isinstance(i, jax.Array) for i in index):
        product = _vector_matmul(rows, weight, index)
    elif 1 < rows.shape[0] <= _SMALL_BATCH_ROWS:
        # XLA:CPU multiplies few rows two to four times as fast with the weight on the left; the barrier keeps it there.
        product = jax.lax.optimization_barrier(einsum_f32("oi,ni->on", index_weight(weight, *index), rows)).T
    else:
        product = einsum_f32("ni,oi->no", rows, index_weight(weight, *index))
    return product.reshape(*x.shape[:-1], product.shape[1]).astype(dtype or x.dtype)


def _vector_matmul(row: jax.Array, weight: Weight, index: tuple[Index, ...]) -> jax.Array:
    """``row @ weight[index].T`` in the one form that XLA:CPU computes without copying the slice first.

    It fuses a slice into a product of a vector and a transposed matrix when the vector is under 16 kB and the product
    is not itself fused into what uses it. (One copy costs as much as three products.)
    """
    matrix, width = index_weight(weight, *index), weight.shape[-1]
    starts = range(0, width, _FUSED_WIDTH)
    parts = [(row[:, i : i + _FUSED_WIDTH], matrix[:, i : i + _FUSED_WIDTH].T) for i in starts]
    products = [jax.lax.optimization_barrier(einsum_f32("ni,io->no", *part)) for part in parts]
    return functools.reduce(jnp.add, products)


def per_head_linear(x: jax.Array, weight: Weight, *index: Index, transpose: bool = False) -> jax.Array:
    """A product per head: ``out[..., n, :] = weight[n] @ x[..., n, :]`` (or with ``weight[n].T``).

    Args:
        x: ``[..., N, I]`` (``[..., N, O]`` when ``transpose``).
        weight: ``[*stack, N, O, I]``.

    Returns:
        ``[..., N, O]`` (``[..., N, I]`` when ``transpose``).
    """
    if isinstance(weight, QuantizedTensor):
        return per_head_quantized_matmul(x, weight, index, transpose=transpose).astype(x.dtype)
    matrix = index_weight(weight, *index)
    return einsum_f32("...no,noi->...ni" if transpose else "...ni,noi->...no", x, matrix).astype(x.dtype)


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``jnp.einsum`` of two arrays, accumulated and returned in float32 (in float64 for float64)."""
    wide = np.promote_types(a.dtype, b.dtype)  # JAX refuses to promote when asked to be strict
    if wide.itemsize >= 4:
        # Without it a GPU would round the operands to TF32: float32 means float32 here.
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum(subscripts, a.astype(wide), b.astype(wide), precision=exact)

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(wide), b.astype(wide), preferred_element_type=jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32))

    # XLA:CPU has no product of 16-bit operands with a 32-bit result.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=narrow)


def embed_tokens(table: Weight, tokens: jax.Array, first_row: Index = 0) -> jax.Array:
    """Rows of an embedding table; zero for tokens outside the rows that this table holds.

    Args:
        table: ``[V, D]``, rows ``first_row`` and up of the whole one.
        tokens: int32 ``[...]``.

    Returns:
        ``[..., D]`` in the table's dtype.
    """
    local = tokens - first_row
    here = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(here, local, 0)
    if isinstance(table, QuantizedTensor):
        values = gather_rows(table, rows)
    elif isinstance(table, TiledWeight):
        values = tiled_matmul.dequantize_slice(table, ())[
            rows
        ]  # tiles are for products: nobody lays an embedding out so
    else:
        values = Bfloat16Bits(table.bits[rows]).to_float32() if isinstance(table, Bfloat16Bits) else table[rows]
    return jnp.where(here[..., None], values, jnp.zeros((), values.dtype)).astype(table.dtype)
