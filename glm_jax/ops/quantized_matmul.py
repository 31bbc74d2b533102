"""Products with quantized weights, dequantized a block of rows at a time on CPUs.

These are the reference forms: they run on every XLA backend, and say what a kernel must compute. Values are float32
until the product is rounded to the activations' dtype by the caller.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax.ops.indexing import Index, RowSlice, take_slice
from glm_jax.weights import QuantizedTensor, dequantize
from glm_jax.weights.quantized_tensor import dequantize_planes

# Rows dequantized together. 16 to 64 rows of 2,048 inputs stay in a core's cache, and were the fastest for one vector
# (4.1 G weights/s against 3.8 in float32; 256 rows had 2.0); many vectors make a large product worth its memory.
_BLOCK_ROWS = 32
_TALL_BLOCK_ROWS = 256
_MANY_VECTORS = 16


def slice_quantized(weight: QuantizedTensor, index: tuple[Index, ...]) -> QuantizedTensor:
    """``weight[index]`` with traced indices on the leading axes, still quantized."""
    return weight.map_components(lambda _, array: take_slice(array, index))


def quantized_matmul(rows: jax.Array, weight: QuantizedTensor, index: tuple[Index, ...]) -> jax.Array:
    """``rows @ weight[index].T`` in float32.

    Args:
        rows: ``[n, I]``.
        weight: ``[*stack, O, I]``.
        index: one per stack axis.

    Returns:
        float32 ``[n, O]``.
    """
    if weight.permutation is not None:
        rows = jnp.take(rows, take_slice(weight.permutation, index), axis=-1)
        weight = _drop_permutation(weight)
    return jax.lax.platform_dependent(
        rows,
        weight,
        cpu=lambda x, w: _matmul_row_blocks(x, w, index),
        default=lambda x, w: _matmul_dequantized(x, w, index),
    )


def per_head_quantized_matmul(
    x: jax.Array, weight: QuantizedTensor, index: tuple[Index, ...], *, transpose: bool
) -> jax.Array:
    """A product per head, one head's matrix dequantized at a time.

    Args:
        x: ``[..., N, I]`` (``[..., N, O]`` when ``transpose``).
        weight: ``[*stack, N, O, I]``.
        index: one per stack axis.
        transpose: multiply by the transposed matrices.

    Returns:
        float32 ``[..., N, O]`` (``[..., N, I]`` when ``transpose``).
    """
    wide = x.astype(jnp.float32)
    flat = jnp.moveaxis(wide, -2, 0).reshape(x.shape[-2], -1, x.shape[-1])

    def head(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, vectors = inputs
        matrix = dequantize(slice_quantized(weight, (*index, number)))
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("ko,oi->ki" if transpose else "ki,oi->ko", vectors, matrix, precision=exact)

    out = jax.lax.map(head, (jnp.arange(x.shape[-2], dtype=jnp.int32), flat))
    return jnp.moveaxis(out.reshape(x.shape[-2], *x.shape[:-2], out.shape[-1]), 0, -2)


def gather_rows(table: QuantizedTensor, rows: jax.Array) -> jax.Array:
    """Rows of a quantized matrix ``[V, D]`` as float32 ``[..., D]``."""
    height = table.spec.block[0]
    of_block = rows // height if height else jnp.zeros_like(rows)

    def pick(name: str, array: jax.Array) -> jax.Array:
        if name in ("outer", "permutation"):
            return array
        return array[of_block if name in ("scales", "zeros") else rows][..., None, :]

    return _dequantized_rows(table.map_components(pick), rows.shape)


def _dequantized_rows(picked: QuantizedTensor, shape: tuple[int, ...]) -> jax.Array:
    """Each row is a matrix of one row here; its permutation and outer scale are those of the whole."""
    extra = {}
    if picked.permutation is not None:
        extra["permutation"] = jnp.broadcast_to(picked.permutation, (*shape, *picked.permutation.shape))
    if picked.outer is not None:
        extra["outer"] = jnp.broadcast_to(picked.outer, shape)
    return dequantize(dataclasses.replace(picked, **extra))[..., 0, :]


def _drop_permutation(weight: QuantizedTensor) -> QuantizedTensor:
    """The stored columns as they lie."""
    return QuantizedTensor(
        weight.codes, weight.scales, weight.zeros, weight.outer, spec=weight.spec, dtype=weight.dtype
    )


def _matmul_dequantized(rows: jax.Array, weight: QuantizedTensor, index: tuple[Index, ...]) -> jax.Array:
    """For accelerators, whose compiler fuses a dequantization into the product of few rows."""
    matrix = dequantize(slice_quantized(weight, index))
    if rows.dtype.itemsize < 4:
        return jnp.einsum("ni,oi->no", rows, matrix.astype(rows.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("ni,oi->no", rows, matrix, precision=jax.lax.Precision.HIGHEST)


def _matmul_row_blocks(rows: jax.Array, weight: QuantizedTensor, index: tuple[Index, ...]) -> jax.Array:
    outputs, count = weight.shape[-2], rows.shape[0]
    height = _largest_divisor(outputs, _BLOCK_ROWS if count <= _MANY_VECTORS else _TALL_BLOCK_ROWS)
    wide, step = rows.astype(jnp.float32), weight.spec.values_per_byte
    vectors = [wide[:, i::step] for i in range(step)]

    def block(start: jax.Array) -> jax.Array:
        planes = dequantize_planes(_row_block(weight, index, start, height))
        products = [_product(plane, x) for plane, x in zip(planes, vectors, strict=True)]
        return sum(products[1:], products[0])

    blocks = outputs // height
    if blocks == 1:
        return block(jnp.int32(0)).T
    return jax.lax.map(block, height * jnp.arange(blocks, dtype=jnp.int32)).reshape(outputs, count).T


def _product(plane: jax.Array, vectors: jax.Array) -> jax.Array:
    """``[R, k]`` by ``[n, k]`` to ``[R, n]``; one vector as a vector, which XLA:CPU has a faster product for."""
    exact = jax.lax.Precision.HIGHEST
    if vectors.shape[0] == 1:
        return jnp.einsum("rk,k->r", plane, vectors[0], precision=exact)[:, None]
    return jnp.einsum("rk,nk->rn", plane, vectors, precision=exact)


def _row_block(weight: QuantizedTensor, index: tuple[Index, ...], start: jax.Array, height: int) -> QuantizedTensor:
    """Rows ``start`` to ``start + height`` of one matrix, with a row of scales for each."""
    rows_per_scale = weight.spec.block[0]

    def pick(name: str, array: jax.Array) -> jax.Array:
        if name == "outer":
            return take_slice(array, index)
        if name == "codes" or rows_per_scale == 1:
            return take_slice(array, (*index, RowSlice(start, height)))
        if not rows_per_scale:
            return take_slice(array, index)
        of_block = (start + jnp.arange(height, dtype=jnp.int32)) // rows_per_scale
        return jnp.take(take_slice(array, index), of_block, axis=0)

    return _with_per_row_scales(weight.map_components(pick))


def _with_per_row_scales(weight: QuantizedTensor) -> QuantizedTensor:
    rows, columns = weight.spec.block
    return dataclasses.replace(weight, spec=dataclasses.replace(weight.spec, block=(1 if rows else 0, columns)))


def _largest_divisor(size: int, most: int) -> int:
    """The largest divisor of ``size`` that is at most ``most``."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)
