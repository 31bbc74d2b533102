"""Weights in tiles: the layout that the matrix kernels read.

A matrix ``[N, K]`` is cut into columns of 64 outputs, and these into *chunks* of 16 words of 32 bits per output. A word
holds 32 / bits codes; the i-th of word r stands for input ``16 i + r`` of the chunk. So one tile is a contiguous block
of memory, read in whole, and the i-th codes of its words are 16 consecutive inputs by 64 outputs: an operand of a
matrix product as it is, with nothing to transpose.

The value of a code is ``code * scale + offset``, with a scale (and perhaps an offset) for each output and group of
inputs; without scales it is the code itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

WeightKind = Literal["int4", "uint4", "int8", "uint8", "fp8", "fp4", "bfloat16", "float32"]
TILE_WIDTH = 64  # outputs of a tile
CHUNK_ROWS = 16  # words of a chunk, per output
BITS_PER_QVALUE: dict[str, int] = {
    "int4": 4, "uint4": 4, "fp4": 4, "int8": 8, "uint8": 8, "fp8": 8, "bfloat16": 16, "float32": 32
}  # fmt: skip


def chunk_inputs(kind: str) -> int:
    """Inputs of a chunk: 128 for 4 bits, 64 for 8."""
    return CHUNK_ROWS * 32 // BITS_PER_QVALUE[kind]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "offsets", "input_scales"],
    meta_fields=["kind", "outputs", "inputs", "group_size"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """A weight ``[*stack, N, K]``, padded with zeros to whole tiles.

    Attributes:
        packed: uint32 ``[*stack, tiles, chunks, 16, 64]``.
        scales: ``[*stack, tiles, groups, 64]``, or None.
        offsets: float32, like the scales, or None.
        input_scales: ``[*stack, n, K]``, of the inputs, one set for each n-th of the outputs; or None. So a matrix
            has its scales whose outputs and inputs have changed places.
        kind: of the codes: "int4" stands for -8 .. 7, "uint4" for 0 .. 15, and so on.
        outputs: N.
        inputs: K.
        group_size: inputs that share a scale, a multiple of 16; 0 for all of them.
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
        """The leading axes."""
        return self.packed.shape[:-4]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (*self.stack, self.outputs, self.inputs)

    @property
    def num_tiles(self) -> int:
        """Columns of 64 outputs."""
        return self.packed.shape[-4]

    @property
    def num_chunks(self) -> int:
        """Chunks of inputs."""
        return self.packed.shape[-3]

    @property
    def num_groups(self) -> int:
        """Scales per output, those of padding included."""
        return 1 if self.scales is None else self.scales.shape[-2]

    def row_scales(self) -> jax.Array | None:
        """The scales ``[*stack, N, groups]``, without those of padding."""
        return None if self.scales is None else self._tile_to_rows(self.scales)

    def row_offsets(self) -> jax.Array | None:
        """The offsets likewise."""
        return None if self.offsets is None else self._tile_to_rows(self.offsets)

    def _tile_to_rows(self, by_tile: jax.Array) -> jax.Array:
        rows = jnp.swapaxes(by_tile, -1, -2).reshape(*self.stack, -1, self.num_groups)[..., : self.outputs, :]
        return rows[..., : self.inputs // self.group_size] if self.group_size else rows

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(x.nbytes for x in (self.packed, self.scales, self.offsets, self.input_scales) if x is not None)


def has_same_layout(a: Tiles, b: Tiles) -> bool:
    """Whether a kernel that was made for one matrix can read the other."""

    def facts(tiles: Tiles) -> tuple[Any, ...]:
        parts = (tiles.packed, tiles.scales, tiles.offsets)
        return tiles.kind, tiles.group_size, *(None if x is None else (x.shape, x.dtype) for x in parts)

    return facts(a) == facts(b)


def is_tileable_group(group_size: int) -> bool:
    """Whether groups of this many inputs can be read in tiles: they must hold whole runs of 16 inputs."""
    return group_size % CHUNK_ROWS == 0


def make_tiles(
    qvalues: jax.Array,
    kind: WeightKind,
    scales: jax.Array | None = None,
    offsets: jax.Array | None = None,
    input_scales: jax.Array | None = None,
) -> Tiles:
    """Lays a weight out in tiles.

    Args:
        qvalues: bit patterns as unsigned integers ``[*stack, N, K]``: uint8 (4-bit codes one to a byte, "int4" as
            0 .. 15 for -8 .. 7, "int8" in two's complement), uint16 for bfloat16, uint32 for float32.
        kind: what they are.
        scales: ``[*stack, N, groups]``, or None.
        offsets: like the scales, or None.
        input_scales: of the inputs, ``[*stack, n, K]``, or None; n divides the number of tiles.
    """
    *stack, outputs, inputs = qvalues.shape
    size, per_word = chunk_inputs(kind), 32 // BITS_PER_QVALUE[kind]
    rows, columns = -outputs % TILE_WIDTH, -inputs % size
    group = 0 if scales is None or scales.shape[-1] == 1 else inputs // scales.shape[-1]
    # Padding must stand for zero: its inputs are read as zero, and of its outputs nothing is kept.
    none = [(0, 0)] * len(stack)
    padded = jnp.pad(qvalues, [*none, (0, rows), (0, columns)])
    tiles, chunks = (outputs + rows) // TILE_WIDTH, (inputs + columns) // size
    split = padded.reshape(*stack, tiles, TILE_WIDTH, chunks, per_word, CHUNK_ROWS)
    # [tile, output, chunk, place, row] -> [tile, chunk, row, output, place]
    n = len(stack)
    ordered = jnp.transpose(split, (*range(n), n, n + 2, n + 4, n + 1, n + 3)).astype(jnp.uint32)
    words = jnp.sum(ordered << _bit_offsets(kind, ordered.ndim), axis=-1, dtype=jnp.uint32)
    more = -(-(inputs + columns) // group) - inputs // group if group else 0
    held = {
        "scales": _rows_to_tiles(scales, rows, more),
        "offsets": _rows_to_tiles(offsets, rows, more),
        "input_scales": input_scales,
    }
    return Tiles(words, **held, kind=kind, outputs=outputs, inputs=inputs, group_size=group)


def _bit_offsets(kind: str, ndim: int) -> jax.Array:
    """Where in a word each of its codes begins, along the last of so many axes."""
    return (jnp.arange(32 // BITS_PER_QVALUE[kind], dtype=jnp.uint32) * jnp.uint32(BITS_PER_QVALUE[kind])).reshape(
        *[1] * (ndim - 1), -1
    )


def _rows_to_tiles(values: Any, rows: int, groups: int) -> Any:
    """``[*stack, N, groups]`` to ``[*stack, tiles, groups, 64]``, with so many rows and groups more."""
    if values is None:
        return None
    padded = jnp.pad(values, [*[(0, 0)] * (values.ndim - 2), (0, rows), (0, groups)])
    split = padded.reshape(*values.shape[:-2], -1, TILE_WIDTH, padded.shape[-1])
    return jnp.swapaxes(split, -1, -2)


def unpack_qvalues(tiles: Tiles) -> jax.Array:
    """The bit patterns, uint32 ``[*stack, N, K]``."""
    n, bits = len(tiles.stack), BITS_PER_QVALUE[tiles.kind]
    codes = (tiles.packed[..., None] >> _bit_offsets(tiles.kind, tiles.packed.ndim + 1)) & jnp.uint32((1 << bits) - 1)
    # [tile, chunk, row, output, place] -> [tile, output, chunk, place, row]
    ordered = jnp.transpose(codes, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    flat = ordered.reshape(*tiles.stack, tiles.num_tiles * TILE_WIDTH, tiles.num_chunks * chunk_inputs(tiles.kind))
    return flat[..., : tiles.outputs, : tiles.inputs]


def dequantize_tiles(tiles: Tiles) -> jax.Array:
    """The values, float32 ``[*stack, N, K]``: what the kernels must compute with."""
    values = decode_qvalues(unpack_qvalues(tiles), tiles.kind)
    if tiles.input_scales is not None:
        height = TILE_WIDTH * tiles.num_tiles // tiles.input_scales.shape[-2]
        values = values * jnp.repeat(tiles.input_scales.astype(jnp.float32), height, axis=-2)[..., : tiles.outputs, :]
    for by_row, add in ((tiles.row_scales(), False), (tiles.row_offsets(), True)):
        if by_row is not None:
            wide = by_row.astype(jnp.float32)
            wide = jnp.repeat(wide, tiles.group_size, axis=-1) if tiles.group_size else wide
            values = values + wide if add else values * wide
    return values


def decode_qvalues(qvalues: jax.Array, kind: str) -> jax.Array:
    """What bit patterns (uint32) stand for before scale and offset, float32."""
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
