"""A quantized weight: a pytree of codes and scales that represents a matrix, or a stack of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from glm_jax.sharding import LogicalAxis
from glm_jax.weights.codes import (
    array_namespace,
    decode_e4m3,
    decode_e8m0,
    decode_planes,
    expand_planes,
    unpack_nibbles,
)
from glm_jax.weights.indexing import Index, RowSlice, largest_divisor, take_slice
from glm_jax.weights.quant_spec import QuantSpec, component_axes
from glm_jax.weights.weight_matrix import StoredArray, WeightMatrix
from pallas_kernels.tiles import TILE_WIDTH, Tiles, is_tileable_group, make_tiles

COMPONENTS = ("codes", "scales", "zeros", "outer", "permutation")

# Rows dequantized together. 16 to 64 rows of 2,048 inputs stay in a core's cache, and were the fastest for one vector
# (4.1 G weights/s against 3.8 in float32; 256 rows had 2.0); many vectors make a large product worth its memory.
_BLOCK_ROWS = 32
_TALL_BLOCK_ROWS = 256
_MANY_VECTORS = 16


@functools.partial(jax.tree_util.register_dataclass, data_fields=COMPONENTS, meta_fields=["spec", "dtype"])
@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedTensor(WeightMatrix):
    """A weight ``[*stack, O, I]`` in codes and scales; :class:`~glm_jax.weights.QuantSpec` has the formulas.

    Its products run on every XLA backend and define what a kernel must compute. Values stay float32 until the caller
    rounds the product.

    Attributes:
        codes: ``uint8 or int8 [*stack, O, I]``; 4-bit codes are ``uint8 [*stack, O, I/2]``, with column 2j in the low
            half of byte j and column 2j + 1 in the high one.
        scales: ``[*stack, ceil(O/rows), ceil(I/columns)]`` for ``spec.block == (rows, columns)``.
        zeros: Zero points or biases, shaped like the scales, or None.
        outer: Global scales ``float32 [*stack]``, or None.
        permutation: ``int32 [*stack, I]`` or None; stored column j is input ``permutation[j]``.
        spec: How codes and scales give values.
        dtype: Dtype of the model that the weight is part of.
    """

    codes: StoredArray
    scales: StoredArray
    zeros: StoredArray = None
    outer: StoredArray = None
    permutation: StoredArray = None
    spec: QuantSpec = dataclasses.field(kw_only=True)
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, not of the codes."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * self.spec.values_per_byte)

    @property
    def quant_spec(self) -> QuantSpec:
        """Quantization of the values."""
        return self.spec

    def components(self) -> dict[str, StoredArray]:
        """The arrays that are not None, by name."""
        return {name: array for name in COMPONENTS if (array := getattr(self, name)) is not None}

    def map_components(self, function: Callable[[str, StoredArray], Any]) -> QuantizedTensor:
        """The same weight with ``function(name, array)`` in place of each array."""
        changed = {name: function(name, array) for name, array in self.components().items()}
        return dataclasses.replace(self, **changed)

    def map_axes(self, axes: Sequence[LogicalAxis | None], function: Callable[..., Any]) -> QuantizedTensor:
        """The same weight with ``function(*component_axes)`` in place of each array."""
        return self.map_components(lambda name, array: function(*component_axes(name, array.shape, axes)))

    def slice_stack(self, index: tuple[Index, ...]) -> QuantizedTensor:
        """``weight[index]`` with traced indices on the leading axes, still quantized."""
        return self.map_components(lambda _, array: take_slice(array, index))

    def values(self, index: tuple[Index, ...] = ()) -> jax.Array:
        """``weight[index]`` in float32, dequantized as a whole."""
        return dequantize(self.slice_stack(index))

    def matmul(self, rows: jax.Array, index: tuple[Index, ...]) -> jax.Array:
        """``rows @ weight[index].T`` in float32, dequantized a block of rows at a time on CPUs."""
        weight = self
        if weight.permutation is not None:
            rows = jnp.take(rows, take_slice(weight.permutation, index), axis=-1)
            weight = dataclasses.replace(weight, permutation=None)
        return jax.lax.platform_dependent(
            rows,
            weight,
            cpu=lambda x, w: _matmul_row_blocks(x, w, index),
            default=lambda x, w: _matmul_dequantized(x, w, index),
        )

    def per_head_matmul(self, x: jax.Array, index: tuple[Index, ...], *, transpose: bool) -> jax.Array:
        """The product per head of :class:`WeightMatrix`, one head's matrix dequantized at a time."""
        wide = x.astype(jnp.float32)
        flat = jnp.moveaxis(wide, -2, 0).reshape(x.shape[-2], -1, x.shape[-1])

        def head(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, vectors = inputs
            matrix = self.values((*index, number))
            exact = jax.lax.Precision.HIGHEST
            return jnp.einsum("ko,oi->ki" if transpose else "ki,oi->ko", vectors, matrix, precision=exact)

        out = jax.lax.map(head, (jnp.arange(x.shape[-2], dtype=jnp.int32), flat))
        return jnp.moveaxis(out.reshape(x.shape[-2], *x.shape[:-2], out.shape[-1]), 0, -2)

    def gather(self, rows: jax.Array) -> jax.Array:
        """Rows of a matrix ``[V, D]`` as ``float32 [..., D]``."""
        height = self.spec.block[0]
        scale_rows = rows // height if height else jnp.zeros_like(rows)

        def pick(name: str, array: jax.Array) -> jax.Array:
            if name in ("outer", "permutation"):
                return array
            return array[scale_rows if name in ("scales", "zeros") else rows][..., None, :]

        return _dequantize_gathered(self.map_components(pick), rows.shape)

    def can_tile(self, *, transposed: bool) -> bool:
        """Whether tiles have a layout for the blocks, zero points and order of this quantization."""
        return _can_tile(self.spec, self.shape, transposed=transposed)

    def to_tiles(self, *, transposed: bool) -> tuple[Tiles, QuantSpec | None]:
        """Tiles with the same codes, and scales as numbers for each row."""
        return _make_tiles(self, transposed=transposed), _untiled_spec(self.spec)

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Entries of the leading (stack) axis."""
        if self.ndim < 3:
            raise IndexError("a single matrix has no stack axis to index")
        return self.map_components(lambda _, array: array[index])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array of float32 (or ``dtype``)."""
        values = dequantize(self.map_components(lambda _, array: np.asarray(array)))
        return values if dtype is None else values.astype(dtype)


def dequantize(tensor: QuantizedTensor) -> StoredArray:
    """The values ``float32 [*stack, O, I]`` of NumPy or JAX arrays, all at once: not for a hot path."""
    xp = array_namespace(tensor.codes)
    planes = dequantize_planes(tensor)
    values = planes[0] if len(planes) == 1 else xp.stack(planes, axis=-1).reshape(tensor.shape)
    if tensor.permutation is None:
        return values
    inverse = xp.argsort(tensor.permutation, axis=-1)
    return xp.take_along_axis(values, xp.broadcast_to(inverse[..., None, :], values.shape), axis=-1)


def dequantize_planes(tensor: QuantizedTensor) -> list[StoredArray]:
    """The values in stored order: ``float32 [*stack, O, I / values_per_byte]`` for each code of a byte.

    Plane i holds columns i, i + values_per_byte, …, so 4-bit codes need not be interleaved before a product.
    """
    spec, count = tensor.spec, tensor.spec.values_per_byte
    scales = expand_planes(decode_scales(tensor), spec, tensor.shape)
    codes = decode_planes(tensor.codes, spec)
    if spec.zero == "none":
        return [codes[i] * scales[i % len(scales)] for i in range(count)]
    zeros = expand_planes(tensor.zeros.astype(array_namespace(tensor.codes).float32), spec, tensor.shape)
    triples = [(codes[i], scales[i % len(scales)], zeros[i % len(zeros)]) for i in range(count)]
    return [u * s + z if spec.zero == "bias" else (u - z) * s for u, s, z in triples]


def decode_scales(tensor: QuantizedTensor) -> StoredArray:
    """The scales in float32, with the global scale applied."""
    xp, spec = array_namespace(tensor.codes), tensor.spec
    decode = {"e4m3": decode_e4m3, "e8m0": decode_e8m0}.get(spec.scale, lambda x: x.astype(xp.float32))
    scales = decode(tensor.scales)
    if spec.outer == "none":
        return scales
    outer = tensor.outer[..., None, None]
    return scales * outer if spec.outer == "multiply" else scales / outer


def _dequantize_gathered(picked: QuantizedTensor, shape: tuple[int, ...]) -> jax.Array:
    """Dequantizes matrices of one row each, which share the permutation and the global scale of the whole."""
    extra = {}
    if picked.permutation is not None:
        extra["permutation"] = jnp.broadcast_to(picked.permutation, (*shape, *picked.permutation.shape))
    if picked.outer is not None:
        extra["outer"] = jnp.broadcast_to(picked.outer, shape)
    return dequantize(dataclasses.replace(picked, **extra))[..., 0, :]


def _matmul_dequantized(rows: jax.Array, weight: QuantizedTensor, index: tuple[Index, ...]) -> jax.Array:
    """The product on accelerators, whose compiler fuses a dequantization into a product of few rows."""
    matrix = weight.values(index)
    if rows.dtype.itemsize < 4:
        return jnp.einsum("ni,oi->no", rows, matrix.astype(rows.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("ni,oi->no", rows, matrix, precision=jax.lax.Precision.HIGHEST)


def _matmul_row_blocks(rows: jax.Array, weight: QuantizedTensor, index: tuple[Index, ...]) -> jax.Array:
    """The product on CPUs: no more than one block of the matrix is ever dequantized."""
    outputs, count = weight.shape[-2], rows.shape[0]
    height = largest_divisor(outputs, _BLOCK_ROWS if count <= _MANY_VECTORS else _TALL_BLOCK_ROWS)
    wide, step = rows.astype(jnp.float32), weight.spec.values_per_byte
    # Even and odd columns of 4-bit codes stay apart, and the vectors are split instead.
    vectors = [wide[:, i::step] for i in range(step)]

    def block(start: jax.Array) -> jax.Array:
        planes = dequantize_planes(_row_block(weight, index, start, height))
        products = [_plane_product(plane, x) for plane, x in zip(planes, vectors, strict=True)]
        return sum(products[1:], products[0])

    blocks = outputs // height
    if blocks == 1:
        return block(jnp.int32(0)).T
    return jax.lax.map(block, height * jnp.arange(blocks, dtype=jnp.int32)).reshape(outputs, count).T


def _plane_product(plane: jax.Array, vectors: jax.Array) -> jax.Array:
    """``[R, k]`` by ``[n, k]`` to ``[R, n]``; XLA:CPU has a faster product for one vector."""
    exact = jax.lax.Precision.HIGHEST
    if vectors.shape[0] == 1:
        return jnp.einsum("rk,k->r", plane, vectors[0], precision=exact)[:, None]
    return jnp.einsum("rk,nk->rn", plane, vectors, precision=exact)


def _row_block(weight: QuantizedTensor, index: tuple[Index, ...], start: jax.Array, height: int) -> QuantizedTensor:
    """Rows ``start`` to ``start + height`` of one matrix, with scales for each of them."""
    rows_per_scale, columns = weight.spec.block

    def pick(name: str, array: jax.Array) -> jax.Array:
        if name == "outer":
            return take_slice(array, index)
        if name == "codes" or rows_per_scale == 1:
            return take_slice(array, (*index, RowSlice(start, height)))
        if not rows_per_scale:
            return take_slice(array, index)
        scale_rows = (start + jnp.arange(height, dtype=jnp.int32)) // rows_per_scale
        return jnp.take(take_slice(array, index), scale_rows, axis=0)

    per_row = dataclasses.replace(weight.spec, block=(1 if rows_per_scale else 0, columns))
    return dataclasses.replace(weight.map_components(pick), spec=per_row)


def _can_tile(spec: QuantSpec, shape: tuple[int, ...], *, transposed: bool) -> bool:
    rows, columns = spec.block
    if spec.permuted or (columns and shape[-1] % columns) or (rows > 1 and shape[-2] % rows):
        return False
    if not transposed:
        return is_tileable_group(columns)
    # Scales of single rows become factors of inputs, one set for each whole number of tiles.
    return rows == 1 and spec.zero == "none" and (not columns or columns % TILE_WIDTH == 0)


def _make_tiles(weight: QuantizedTensor, *, transposed: bool) -> Tiles:
    spec = weight.spec
    codes = unpack_nibbles(weight.codes) if spec.values_per_byte == 2 else weight.codes
    if codes.dtype == jnp.int8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    scales = _expand_to_rows(weight.scales if _has_plain_scales(spec) else decode_scales(weight), spec, weight.shape)
    kind: Any = spec.kind if spec.zero == "none" else f"u{spec.kind}"
    if transposed:
        return make_tiles(jnp.swapaxes(codes, -1, -2), kind, input_scales=jnp.swapaxes(scales, -1, -2))
    return make_tiles(codes, kind, scales, _offsets(weight, scales))


def _has_plain_scales(spec: QuantSpec) -> bool:
    return spec.outer == "none" and spec.scale not in ("e4m3", "e8m0")


def _untiled_spec(spec: QuantSpec) -> QuantSpec:
    """The quantization of a weight that comes out of its tiles: scales by row, and as numbers."""
    scale = spec.scale if _has_plain_scales(spec) else "float32"
    return dataclasses.replace(spec, block=(1, spec.block[1]), scale=scale, outer="none")


def _expand_to_rows(blocks: jax.Array, spec: QuantSpec, shape: tuple[int, ...]) -> jax.Array:
    """One row of scales for each output."""
    rows = spec.block[0]
    if rows == 1:
        return blocks
    return jnp.repeat(blocks, rows or shape[-2], axis=-2)[..., : shape[-2], :]


def _offsets(weight: QuantizedTensor, scales: jax.Array) -> jax.Array | None:
    """What tiles add to ``code * scale``: the bias, or minus the zero point times the scale."""
    if weight.zeros is None:
        return None
    zeros = _expand_to_rows(weight.zeros.astype(jnp.float32), weight.spec, weight.shape)
    return zeros if weight.spec.zero == "bias" else -zeros * scales.astype(jnp.float32)
