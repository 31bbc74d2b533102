"""Products with plain arrays, in the forms that XLA:CPU computes fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.weights.indexing import Index

_FUSED_WIDTH = 2560  # divides the long widths of GLM-4.7-Flash, 5,120 and 10,240; 16 kB would be 4,096
_SMALL_BATCH_ROWS = 256


def dense_matmul(rows: jax.Array, matrix: jax.Array, index: tuple[Index, ...]) -> jax.Array:
    """``rows @ matrix.T``, accumulated in float32.

    Args:
        rows: ``[n, I]``.
        matrix: ``[O, I]``, already sliced from its stack.
        index: Index of that slice; a traced one decides the form of the product.

    Returns:
        ``float32 [n, O]``.
    """
    if rows.shape[0] == 1 and any(isinstance(i, jax.Array) for i in index):
        return _vector_matmul(rows, matrix)
    if 1 < rows.shape[0] <= _SMALL_BATCH_ROWS:
        # XLA:CPU multiplies few rows two to four times as fast with the weight on the left; the barrier keeps it there.
        return jax.lax.optimization_barrier(einsum_f32("oi,ni->on", matrix, rows)).T
    return einsum_f32("ni,oi->no", rows, matrix)


def _vector_matmul(row: jax.Array, matrix: jax.Array) -> jax.Array:
    """``row @ matrix.T`` in the one form that XLA:CPU computes without copying the slice first.

    It fuses a slice into a product of a vector and a transposed matrix when the vector is under 16 kB and the product
    is not itself fused into its consumer. (One copy costs as much as three products.)
    """
    starts = range(0, matrix.shape[-1], _FUSED_WIDTH)
    parts = [(row[:, i : i + _FUSED_WIDTH], matrix[:, i : i + _FUSED_WIDTH].T) for i in starts]
    products = [jax.lax.optimization_barrier(einsum_f32("ni,io->no", *part)) for part in parts]
    return functools.reduce(jnp.add, products)


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``jnp.einsum`` of two arrays, accumulated and returned in float32 (in float64 for float64)."""
    wide = np.promote_types(a.dtype, b.dtype)  # strict JAX does not promote implicitly
    if wide.itemsize >= 4:
        # Without HIGHEST a GPU would round float32 operands to TF32.
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum(subscripts, a.astype(wide), b.astype(wide), precision=exact)

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(wide), b.astype(wide), preferred_element_type=jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32))

    # XLA:CPU has no product of 16-bit operands with a 32-bit result.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=narrow)
