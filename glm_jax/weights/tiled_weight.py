"""Weights in the tiles that the GPU kernels read: another layout of the same codes, hence the same values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from glm_jax.sharding import LogicalAxis
from glm_jax.weights.codes import pack_nibbles
from glm_jax.weights.dense_weight import FLOAT_BITS_DTYPES, as_weight_matrix
from glm_jax.weights.indexing import Index, take_slice
from glm_jax.weights.quant_spec import QuantSpec
from glm_jax.weights.quantized_tensor import QuantizedTensor
from glm_jax.weights.weight_matrix import StoredArray, WeightMatrix
from pallas_kernels import grouped_matmul, kernels_available
from pallas_kernels.quant_matmul import fused_linear
from pallas_kernels.tiles import (
    TILE_WIDTH,
    Tiles,
    chunk_inputs,
    dequantize_tiles,
    has_same_layout,
    unpack_qvalues,
)

_TILE_ARRAYS = ("packed", "scales", "offsets", "input_scales")
_SMALL_BATCH_ROWS = 64
_MIN_BLOCK_OUTPUTS = 32  # outputs of the smallest block that a program works on


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tiles"], meta_fields=["spec", "dtype", "transposed"])
@dataclasses.dataclass(frozen=True, slots=True)
class TiledWeight(WeightMatrix):
    """A weight ``[*stack, O, I]`` in the layout of :mod:`pallas_kernels.tiles`.

    Kernels multiply with the tiles where this process has them; elsewhere the matrix is taken out of its tiles first.

    Attributes:
        tiles: Codes, scales and offsets.
        spec: Quantization of the weight outside its tiles; None for plain floats.
        dtype: Dtype of the model that the weight is part of.
        transposed: Whether the tiles hold the transposed matrices, for products with the transpose.
    """

    tiles: Tiles
    spec: QuantSpec | None = None
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), kw_only=True)
    transposed: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        *stack, outputs, inputs = self.tiles.shape
        return (*stack, inputs, outputs) if self.transposed else (*stack, outputs, inputs)

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Sharding of the packed codes."""
        return self.tiles.packed.sharding

    @property
    def quant_spec(self) -> QuantSpec | None:
        """Quantization of the weight outside its tiles."""
        return self.spec

    @property
    def is_tiled(self) -> bool:
        """True."""
        return True

    @property
    def runs_in_kernels(self) -> bool:
        """Whether this process has kernels: the one question by which operations take a kernel or the reference."""
        return kernels_available()

    @property
    def kernel_tiles(self) -> Tiles | None:
        """The tiles where kernels multiply with them as they are; None without kernels and for transposed tiles."""
        return None if self.transposed or not self.runs_in_kernels else self.tiles

    def components(self) -> dict[str, StoredArray]:
        """The arrays of the tiles that are not None, by name."""
        return {name: array for name in _TILE_ARRAYS if (array := getattr(self.tiles, name)) is not None}

    def map_components(self, function: Callable[[str, StoredArray], Any]) -> TiledWeight:
        """The same weight with ``function(name, array)`` in place of each array of the tiles."""
        changed = {name: function(name, array) for name, array in self.components().items()}
        return dataclasses.replace(self, tiles=dataclasses.replace(self.tiles, **changed))

    def map_axes(self, axes: Sequence[LogicalAxis | None], function: Callable[..., Any]) -> TiledWeight:
        """Columns of tiles have the axis of the outputs, chunks and groups that of the inputs."""
        *stack, outputs, inputs = axes
        if self.transposed:
            outputs, inputs = inputs, outputs
        scale_axes = (*stack, outputs, inputs if self.tiles.group_size else None, None)
        axes_of = {
            "packed": (*stack, outputs, inputs, None, None),
            "scales": scale_axes,
            "offsets": scale_axes,
            "input_scales": (*stack, None, None),
        }
        return self.map_components(lambda name, _: function(*axes_of[name]))

    def to_float32(self) -> jax.Array:
        """The values ``float32 [*stack, O, I]``, all at once."""
        values = dequantize_tiles(self.tiles)
        return jnp.swapaxes(values, -1, -2) if self.transposed else values

    def values(self, index: tuple[Index, ...] = ()) -> jax.Array:
        """``weight[index]`` in float32."""
        return self.map_components(lambda _, array: take_slice(array, index)).to_float32()

    def matmul(self, rows: jax.Array, index: tuple[Index, ...]) -> jax.Array:
        """``rows @ weight[index].T`` in float32, in a kernel or by the reference."""
        if self.kernel_tiles is None:
            return self._matmul_reference(rows, index)
        if rows.shape[0] > _SMALL_BATCH_ROWS:
            return grouped_matmul.grouped_matmul(rows, *flatten_stack(self.tiles, index), dtype=jnp.float32)
        num_counters = math.ceil(rows.shape[0] / 16) * (TILE_WIDTH // _MIN_BLOCK_OUTPUTS) * self.tiles.num_tiles
        counters = jnp.zeros(num_counters, jnp.int32)
        product, _ = fused_linear(rows, *flatten_stack(self.tiles, index), counters, dtype=jnp.float32)
        return product.out

    def _matmul_reference(self, rows: jax.Array, index: tuple[Index, ...]) -> jax.Array:
        # In the dtype of the activations, which the tensor cores of a GPU multiply.
        matrix = self.values(index).astype(rows.dtype)
        exact = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            rows, matrix, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )

    def gather(self, rows: jax.Array) -> jax.Array:
        """Rows of a matrix in float32. Tiles are for products: no loader lays out an embedding this way."""
        return self.values()[rows]

    def can_fuse_gate_up(self, up: WeightMatrix) -> bool:
        """Whether one kernel can multiply with both matrices."""
        gate_tiles, up_tiles = self.kernel_tiles, up.kernel_tiles
        return gate_tiles is not None and up_tiles is not None and has_same_layout(gate_tiles, up_tiles)

    def fused_gate_up(self, rows: jax.Array, up: WeightMatrix, index: tuple[Index, ...]) -> jax.Array:
        """``silu(rows @ weight[index].T) * (rows @ up[index].T)`` in one kernel."""
        assert up.kernel_tiles is not None  # can_fuse_gate_up
        flat, layer_index = flatten_stack(self.tiles, index)
        return grouped_matmul.gated_linear_unit(rows, flat, flatten_stack(up.kernel_tiles, index)[0], layer_index)

    def untile(self) -> jax.Array | QuantizedTensor:
        """The weight out of its tiles; see :func:`untile_weight`."""
        return untile_weight(self)

    def to_local(self) -> TiledWeight:
        """The weight with the sizes of this device's part: tiles carry those of the whole."""
        tiles = self.tiles
        outputs = min(tiles.outputs, TILE_WIDTH * tiles.num_tiles)
        inputs = min(tiles.inputs, chunk_inputs(tiles.kind) * tiles.num_chunks)
        return dataclasses.replace(self, tiles=dataclasses.replace(tiles, outputs=outputs, inputs=inputs))

    def __getitem__(self, index: Any) -> TiledWeight:
        """Entries of the leading (stack) axis."""
        if self.ndim < 3:
            raise IndexError("a single matrix has no stack axis to index")
        return dataclasses.replace(self, tiles=jax.tree.map(lambda array: array[index], self.tiles))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array of float32 (or ``dtype``)."""
        return np.asarray(self.to_float32(), dtype)


def flatten_stack(tiles: Tiles, index: tuple[Index, ...]) -> tuple[Tiles, jax.Array]:
    """Merges all stack axes into one.

    Returns:
        The tiles with one stack axis, and the index in it, ``int32 [1]``.
    """
    sizes = tiles.stack
    flat_index = functools.reduce(lambda at, pair: at * pair[0] + pair[1], zip(sizes, index, strict=True), jnp.int32(0))
    kept = len(sizes)
    flat = jax.tree.map(lambda array: array.reshape(math.prod(sizes), *array.shape[kept:]), tiles)
    return flat, jnp.asarray(flat_index, jnp.int32).reshape(1)


def tile_weight(weight: WeightMatrix | StoredArray, *, transposed: bool = False) -> TiledWeight | None:
    """Lays a weight out in tiles; None where no kernel could read it. Values do not change.

    Args:
        weight: Array, :class:`~glm_jax.weights.Bfloat16Bits` or :class:`~glm_jax.weights.QuantizedTensor` of two
            dimensions or more.
        transposed: Lay out the transposed matrices.
    """
    return _tile_stack(weight, transposed) if as_weight_matrix(weight).can_tile(transposed=transposed) else None


@functools.partial(jax.jit, static_argnames="transposed")
def _tile_stack(weight: WeightMatrix | StoredArray, transposed: bool) -> TiledWeight:
    """Lays a stack out layer by layer: on the way each code takes up to four bytes."""
    lay_out = functools.partial(_tile_matrix, transposed=transposed)
    return jax.lax.map(lay_out, weight) if len(weight.shape) > 2 else lay_out(weight)


def _tile_matrix(weight: WeightMatrix | StoredArray, transposed: bool) -> TiledWeight:
    tiles, spec = as_weight_matrix(weight).to_tiles(transposed=transposed)
    return TiledWeight(tiles, spec, dtype=jnp.dtype(weight.dtype), transposed=transposed)


def untile_weight(weight: TiledWeight) -> jax.Array | QuantizedTensor:
    """The weight out of its tiles: the same values, and the same codes where its scales were single numbers."""
    tiles, spec = weight.tiles, weight.spec
    codes = unpack_qvalues(tiles)
    if weight.transposed:
        codes = jnp.swapaxes(codes, -1, -2)
    if spec is None:
        bits = codes.astype(FLOAT_BITS_DTYPES[tiles.kind])
        return jax.lax.bitcast_convert_type(bits, jnp.dtype(tiles.kind))
    packed = codes.astype(jnp.uint8)
    if spec.values_per_byte == 2:
        packed = pack_nibbles(packed)
    elif tiles.kind == "int8":
        packed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    scales: Any = tiles.row_scales() if tiles.input_scales is None else jnp.swapaxes(tiles.input_scales, -1, -2)
    return QuantizedTensor(packed, scales, _zeros_from_offsets(tiles, scales, spec), spec=spec, dtype=weight.dtype)


def _zeros_from_offsets(tiles: Tiles, scales: jax.Array, spec: QuantSpec) -> jax.Array | None:
    offsets = tiles.row_offsets()
    if offsets is None:
        return None
    if spec.zero != "point":
        return offsets.astype(scales.dtype)
    zeros = jnp.round(-offsets / scales.astype(jnp.float32))
    return zeros.astype(jnp.uint8 if spec.kind == "int4" else jnp.int16)
