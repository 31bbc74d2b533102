"""Weights as the kernels of a GPU read them: the codes of a weight in tiles, its values unchanged."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.weights.bf16_bits import Bfloat16Bits
from glm_jax.weights.codes import pack_nibbles, unpack_nibbles
from glm_jax.weights.quant_spec import QuantSpec
from glm_jax.weights.quantized_tensor import QuantizedTensor, decode_scales
from pallas_kernels.tiles import TILE_WIDTH, Tiles, dequantize_tiles, is_tileable_group, make_tiles, unpack_qvalues

TileDtype = Literal["int4", "uint4", "int8", "uint8", "fp8", "fp4", "bfloat16", "float32"]
_BITS = {"bfloat16": jnp.uint16, "float32": jnp.uint32}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tiles"], meta_fields=["spec", "dtype", "transposed"])
@dataclasses.dataclass(frozen=True, slots=True)
class TiledWeight:
    """A weight ``[*stack, O, I]`` in the layout of :mod:`pallas_kernels.tiles`.

    Attributes:
        tiles: codes, scales and offsets.
        spec: how the weight is stored when it is not in tiles; None for plain numbers.
        dtype: of the model that the weight is part of.
        transposed: whether the tiles hold the transposed matrices, for products with those.
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
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.tiles.nbytes

    @property
    def sharding(self) -> Any:
        """Where the codes live."""
        return self.tiles.packed.sharding

    def __getitem__(self, index: Any) -> TiledWeight:
        """Entries of the leading (stack) axis."""
        if self.ndim < 3:
            raise IndexError("a single matrix has no stack axis to index")
        return dataclasses.replace(self, tiles=jax.tree.map(lambda array: array[index], self.tiles))

    def to_float32(self) -> jax.Array:
        """float32 ``[*stack, O, I]``; the whole at once."""
        values = dequantize_tiles(self.tiles)
        return jnp.swapaxes(values, -1, -2) if self.transposed else values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array of float32 (or ``dtype``)."""
        return np.asarray(self.to_float32(), dtype)


def tile_weight(weight: Any, *, transposed: bool = False) -> TiledWeight | None:
    """A weight in tiles, of the same values; None where no kernel could read it.

    Args:
        weight: array, :class:`~glm_jax.weights.Bfloat16Bits` or :class:`~glm_jax.weights.QuantizedTensor`, with two
            dimensions or more.
        transposed: lay the transposed matrices out.
    """
    spec = getattr(weight, "spec", None)
    if spec is not None and not _can_tile(spec, weight.shape, transposed):
        return None
    if spec is None and jnp.dtype(weight.dtype).name not in _BITS:
        return None
    return _tile_stack(weight, transposed)


def _can_tile(spec: QuantSpec, shape: tuple[int, ...], turned: bool) -> bool:
    rows, columns = spec.block
    if spec.permuted or (columns and shape[-1] % columns) or (rows > 1 and shape[-2] % rows):
        return False
    if not turned:
        return is_tileable_group(columns)
    # Scales of single rows become factors of inputs, one set for each whole number of tiles.
    return rows == 1 and spec.zero == "none" and (not columns or columns % TILE_WIDTH == 0)


@functools.partial(jax.jit, static_argnames="turned")
def _tile_stack(weight: Any, turned: bool) -> TiledWeight:
    """A stack is laid out layer by layer: on the way each code takes up to four bytes."""
    one = functools.partial(_tile_matrix, turned=turned)
    return jax.lax.map(one, weight) if len(weight.shape) > 2 else one(weight)


def _tile_matrix(weight: Any, turned: bool) -> TiledWeight:
    if not isinstance(weight, QuantizedTensor):
        kind: Any = jnp.dtype(weight.dtype).name
        bits = weight.bits if isinstance(weight, Bfloat16Bits) else jax.lax.bitcast_convert_type(weight, _BITS[kind])
        made = make_tiles(jnp.swapaxes(bits, -1, -2) if turned else bits, kind)
        return TiledWeight(made, None, dtype=jnp.dtype(weight.dtype), transposed=turned)
    spec = weight.spec
    codes = unpack_nibbles(weight.codes) if spec.values_per_byte == 2 else weight.codes
    if codes.dtype == jnp.int8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    scales = weight.scales if spec.outer == "none" and spec.scale not in ("e4m3", "e8m0") else decode_scales(weight)
    scales = _expand_to_rows(scales, spec, weight.shape)
    kind = spec.kind if spec.zero == "none" else f"u{spec.kind}"
    if turned:
        factors = jnp.swapaxes(scales, -1, -2)
        made = make_tiles(jnp.swapaxes(codes, -1, -2), kind, input_scales=factors)
    else:
        made = make_tiles(codes, kind, scales, _offsets(weight, scales))
    return TiledWeight(made, _untiled_spec(spec), dtype=weight.dtype, transposed=turned)


def _expand_to_rows(blocks: jax.Array, spec: QuantSpec, shape: tuple[int, ...]) -> jax.Array:
    rows = spec.block[0]
    if rows == 1:
        return blocks
    return jnp.repeat(blocks, rows or shape[-2], axis=-2)[..., : shape[-2], :]


def _offsets(weight: QuantizedTensor, scales: jax.Array) -> jax.Array | None:
    if weight.zeros is None:
        return None
    zeros = _expand_to_rows(weight.zeros.astype(jnp.float32), weight.spec, weight.shape)
    return zeros if weight.spec.zero == "bias" else -zeros * scales.astype(jnp.float32)


def _untiled_spec(spec: QuantSpec) -> QuantSpec:
    """The spec of the weight when it is taken out of its tiles again: scales by row, and as numbers."""
    plain = spec.outer == "none" and spec.scale not in ("e4m3", "e8m0")
    return dataclasses.replace(spec, block=(1, spec.block[1]), scale=spec.scale if plain else "float32", outer="none")


def untile_weight(weight: TiledWeight) -> jax.Array | QuantizedTensor:
    """The weight out of its tiles; the same values, and where scales were single numbers the same codes."""
    tiles, spec = weight.tiles, weight.spec
    codes = unpack_qvalues(tiles)
    if weight.transposed:
        codes = jnp.swapaxes(codes, -1, -2)
    if spec is None:
        return jax.lax.bitcast_convert_type(codes.astype(_BITS[tiles.kind]), jnp.dtype(tiles.kind))
    packed = codes.astype(jnp.uint8)
    if spec.values_per_byte == 2:
        packed = pack_nibbles(packed)
    elif tiles.kind == "int8":
        packed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    scales: Any = tiles.row_scales() if tiles.input_scales is None else jnp.swapaxes(tiles.input_scales, -1, -2)
    offsets, zeros = tiles.row_offsets(), None
    if offsets is not None:
        if spec.zero == "point":
            kind = jnp.uint8 if spec.kind == "int4" else jnp.int16
            zeros = jnp.round(-offsets / scales.astype(jnp.float32)).astype(kind)
        else:
            zeros = offsets.astype(scales.dtype)
    return QuantizedTensor(packed, scales, zeros, spec=spec, dtype=weight.dtype)
