"""Weights in tiles: the memory layout that the matrix kernels read.

A matrix ``[N, K]`` is cut into tiles of 64 outputs, and each tile into *chunks* of 16 packed words of 32 bits per
output. A word packs ``32 / bits`` qvalues, and the i-th qvalue of word r belongs to input ``16 i + r`` of the chunk. So
a chunk is one contiguous block of memory, and the i-th qvalues of its words are 16 consecutive inputs by 64 outputs:
an operand of a matrix product with nothing to transpose.

The value of a qvalue is ``qvalue * scale + offset``, with a scale (and perhaps an offset) for each output and group of
inputs; without scales it is the qvalue itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Literal

import jax
import jax.numpy as jnp

WeightKind = Literal["int4", "uint4", "int8", "uint8", "fp8", "fp4", "bfloat16", "float32"]
TILE_WIDTH = 64  # outputs of a tile
CHUNK_ROWS = 16  # packed words of a chunk, per output
BITS_PER_QVALUE: dict[str, int] = {
    "int4": 4, "uint4": 4, "fp4": 4, "int8": 8, "uint8": 8, "fp8": 8, "bfloat16": 16, "float32": 32
}  # fmt: skip


def chunk_inputs(kind: str) -> int:
    """Returns the number of inputs in a chunk: 128 for 4 bits, 64 for 8."""
    return CHUNK_ROWS * 32 // BITS_PER_QVALUE[kind]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TileLayout:
    """The static layout of a tiled weight, as one constexpr of a kernel.

    Attributes:
        kind: Kind of the qvalues.
        outputs: N, without padding.
        inputs: K, without padding.
        num_tiles: Tiles of 64 outputs in a matrix.
        num_chunks: Chunks of inputs in a matrix.
        num_groups: Scales per output.
        group_size: Inputs that share a scale; 0 if all do.
        scale_span: Inputs of a chunk that are multiplied under one scale: a common divisor of chunk and group.
        qvalues_per_word: Qvalues packed into 32 bits.
        has_scales: Whether the weight has scales.
        has_offsets: Whether it has offsets.
    """

    kind: WeightKind
    outputs: int
    inputs: int
    num_tiles: int
    num_chunks: int
    num_groups: int
    group_size: int
    scale_span: int
    qvalues_per_word: int
    has_scales: bool
    has_offsets: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "offsets", "input_scales"],
    meta_fields=["kind", "outputs", "inputs", "group_size"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """A weight ``[*stack, N, K]``, padded with zeros to whole tiles.

    Attributes:
        packed: ``uint32 [*stack, tiles, chunks, 16, 64]``.
        scales: ``[*stack, tiles, groups, 64]``, or ``None``.
        offsets: ``float32 [*stack, tiles, groups, 64]``, or ``None``.
        input_scales: ``[*stack, n, K]``, or ``None``. One set of scales of the inputs for each n-th of the outputs. A
            matrix whose outputs and inputs were swapped has its scales here.
        kind: Kind of the qvalues: "int4" is -8 .. 7, "uint4" is 0 .. 15, and so on.
        outputs: N.
        inputs: K.
        group_size: Inputs that share a scale, a multiple of 16; 0 if all do.
    """

    packed: jax.Array
    scales: jax.Array | None = None
    offsets: jax.Array | None = None
    input_scales: jax.Array | None = None
    kind: WeightKind = "int4"
    outputs: int = 0
    inputs: int = 0
    group_size: int = 0

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the weight."""
        return self.packed.shape[:-4]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``[*stack, N, K]`` of the weight."""
        return (*self.stack, self.outputs, self.inputs)

    @property
    def num_tiles(self) -> int:
        """Tiles of 64 outputs in a matrix."""
        return self.packed.shape[-4]

    @property
    def num_chunks(self) -> int:
        """Chunks of inputs in a matrix."""
        return self.packed.shape[-3]

    @property
    def num_groups(self) -> int:
        """Scales per output, including those of padding."""
        return 1 if self.scales is None else self.scales.shape[-2]

    @property
    def layout(self) -> TileLayout:
        """Static layout of the weight, for the kernels."""
        size = chunk_inputs(self.kind)
        return TileLayout(
            kind=self.kind,
            outputs=self.outputs,
            inputs=self.inputs,
            num_tiles=self.num_tiles,
            num_chunks=self.num_chunks,
            num_groups=self.num_groups,
            group_size=self.group_size,
            scale_span=math.gcd(self.group_size, size) if self.group_size else size,
            qvalues_per_word=size // CHUNK_ROWS,
            has_scales=self.scales is not None,
            has_offsets=self.offsets is not None,
        )

    def row_scales(self) -> jax.Array | None:
        """Returns the scales ``[*stack, N, groups]`` without padding, or ``None``."""
        return None if self.scales is None else self._tile_to_rows(self.scales)

    def row_offsets(self) -> jax.Array | None:
        """Returns the offsets ``float32 [*stack, N, groups]`` without padding, or ``None``."""
        return None if self.offsets is None else self._tile_to_rows(self.offsets)

    def _tile_to_rows(self, by_tile: jax.Array) -> jax.Array:
        rows = jnp.swapaxes(by_tile, -1, -2).reshape(*self.stack, -1, self.num_groups)[..., : self.outputs, :]
        return rows[..., : self.inputs // self.group_size] if self.group_size else rows

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(x.nbytes for x in (self.packed, self.scales, self.offsets, self.input_scales) if x is not None)


def has_same_layout(a: Tiles, b: Tiles) -> bool:
    """Returns whether one kernel can read both weights."""

    def facts(tiles: Tiles) -> tuple[Hashable, ...]:
        arrays = (tiles.packed, tiles.scales, tiles.offsets)
        return tiles.kind, tiles.group_size, *(None if x is None else (x.shape, x.dtype) for x in arrays)

    return facts(a) == facts(b)


def is_tileable_group(group_size: int) -> bool:
    """Returns whether a group of this many inputs is a whole number of the 16 inputs that are read at once."""
    return group_size % CHUNK_ROWS == 0


def make_tiles(
    qvalues: jax.Array,
    kind: WeightKind,
    scales: jax.Array | None = None,
    offsets: jax.Array | None = None,
    input_scales: jax.Array | None = None,
) -> Tiles:
    """Arranges a weight in tiles.

    Args:
        qvalues: Bit patterns as unsigned integers ``[*stack, N, K]``: uint8 (4-bit qvalues one to a byte, "int4" as
            0 .. 15 for -8 .. 7, "int8" in two's complement), uint16 for bfloat16, uint32 for float32.
        kind: Kind of the qvalues.
        scales: ``[*stack, N, groups]``, or ``None``.
        offsets: ``float32 [*stack, N, groups]``, or ``None``.
        input_scales: ``[*stack, n, K]``, or ``None``; n divides the number of tiles.
    """
    *stack, outputs, inputs = qvalues.shape
    size, per_word = chunk_inputs(kind), 32 // BITS_PER_QVALUE[kind]
    pad_outputs, pad_inputs = -outputs % TILE_WIDTH, -inputs % size
    group_size = 0 if scales is None or scales.shape[-1] == 1 else inputs // scales.shape[-1]
    # The kernels read zero for the inputs of padding, and drop its outputs.
    padded = jnp.pad(qvalues, [*[(0, 0)] * len(stack), (0, pad_outputs), (0, pad_inputs)])
    tiles, chunks = (outputs + pad_outputs) // TILE_WIDTH, (inputs + pad_inputs) // size
    split = padded.reshape(*stack, tiles, TILE_WIDTH, chunks, per_word, CHUNK_ROWS)
    # [tile, output, chunk, qvalue, row] -> [tile, chunk, row, output, qvalue]
    n = len(stack)
    ordered = jnp.transpose(split, (*range(n), n, n + 2, n + 4, n + 1, n + 3)).astype(jnp.uint32)
    packed = jnp.sum(ordered << _bit_offsets(kind, ordered.ndim), axis=-1, dtype=jnp.uint32)
    pad_groups = -(-(inputs + pad_inputs) // group_size) - inputs // group_size if group_size else 0
    return Tiles(
        packed,
        scales=_rows_to_tiles(scales, pad_outputs, pad_groups),
        offsets=_rows_to_tiles(offsets, pad_outputs, pad_groups),
        input_scales=input_scales,
        kind=kind,
        outputs=outputs,
        inputs=inputs,
        group_size=group_size,
    )


def _bit_offsets(kind: str, ndim: int) -> jax.Array:
    """Returns the first bit of each qvalue of a word along the last of ``ndim`` axes."""
    bits = BITS_PER_QVALUE[kind]
    return (jnp.arange(32 // bits, dtype=jnp.uint32) * jnp.uint32(bits)).reshape(*[1] * (ndim - 1), -1)


def _rows_to_tiles(values: jax.Array | None, pad_outputs: int, pad_groups: int) -> jax.Array | None:
    """Rearranges ``[*stack, N, groups]`` to ``[*stack, tiles, groups, 64]`` after padding outputs and groups."""
    if values is None:
        return None
    padded = jnp.pad(values, [*[(0, 0)] * (values.ndim - 2), (0, pad_outputs), (0, pad_groups)])
    split = padded.reshape(*values.shape[:-2], -1, TILE_WIDTH, padded.shape[-1])
    return jnp.swapaxes(split, -1, -2)


def unpack_qvalues(tiles: Tiles) -> jax.Array:
    """Returns the bit patterns ``uint32 [*stack, N, K]``."""
    n, bits = len(tiles.stack), BITS_PER_QVALUE[tiles.kind]
    mask = jnp.uint32((1 << bits) - 1)
    qvalues = (tiles.packed[..., None] >> _bit_offsets(tiles.kind, tiles.packed.ndim + 1)) & mask
    # [tile, chunk, row, output, qvalue] -> [tile, output, chunk, qvalue, row]
    ordered = jnp.transpose(qvalues, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    flat = ordered.reshape(*tiles.stack, tiles.num_tiles * TILE_WIDTH, tiles.num_chunks * chunk_inputs(tiles.kind))
    return flat[..., : tiles.outputs, : tiles.inputs]


def dequantize_tiles(tiles: Tiles) -> jax.Array:
    """Returns the values ``float32 [*stack, N, K]`` that the kernels compute with."""
    values = decode_qvalues(unpack_qvalues(tiles), tiles.kind)
    if tiles.input_scales is not None:
        outputs_per_set = TILE_WIDTH * tiles.num_tiles // tiles.input_scales.shape[-2]
        by_output = jnp.repeat(tiles.input_scales.astype(jnp.float32), outputs_per_set, axis=-2)
        values = values * by_output[..., : tiles.outputs, :]
    if (scales := tiles.row_scales()) is not None:
        values = values * _repeat_groups(scales, tiles.group_size)
    if (offsets := tiles.row_offsets()) is not None:
        values = values + _repeat_groups(offsets, tiles.group_size)
    return values


def _repeat_groups(by_group: jax.Array, group_size: int) -> jax.Array:
    """Repeats ``[*stack, N, groups]`` for every input of a group, as float32."""
    wide = by_group.astype(jnp.float32)
    return jnp.repeat(wide, group_size, axis=-1) if group_size else wide


def decode_qvalues(qvalues: jax.Array, kind: str) -> jax.Array:
    """Returns the float32 values of bit patterns (uint32), before scale and offset."""
    if kind in ("int4", "uint4", "uint8"):
        return qvalues.astype(jnp.float32) - jnp.float32(8 if kind == "int4" else 0)
    if kind == "int8":
        return qvalues.astype(jnp.uint8).astype(jnp.int8).astype(jnp.float32)
    if kind == "fp8":
        return jax.lax.bitcast_convert_type(qvalues.astype(jnp.uint8), jnp.float8_e4m3fn).astype(jnp.float32)
    if kind == "fp4":
        half = ((qvalues & jnp.uint32(8)) << jnp.uint32(12)) | ((qvalues & jnp.uint32(7)) << jnp.uint32(9))
        return jax.lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(jnp.float32) * 16384.0
    bits = qvalues << jnp.uint32(16) if kind == "bfloat16" else qvalues
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
