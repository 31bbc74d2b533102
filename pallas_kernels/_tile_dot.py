"""Triton device functions that the matrix kernels share: products with weights in tiles (see ``tiles.py``).

Row masks are boolean tensors ``[BLOCK_M]`` of the rows that exist. ``tile`` is the index of a tile in the whole stack
as a 64-bit integer, and ``tile_offset`` the first of its 64 outputs that a program computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pallas_kernels._dequantize import dequant_plane


class TilePointers(NamedTuple):
    """The arrays of a tiled weight within a kernel.

    Its constexpr :class:`~pallas_kernels.tiles.TileLayout` is a parameter of its own, because Triton turns the
    constexprs of a tuple into tensors when the tuple is assigned to a variable.

    Attributes:
        packed: Pointer to the packed words of the whole stack.
        scales: Pointer to its scales; not read if there are none.
        offsets: Pointer to its offsets; not read if there are none.
    """

    packed: Any
    scales: Any
    offsets: Any


@triton.jit
def dot_accumulate(a, b, acc, DTYPE: tl.constexpr):
    """``acc + a @ b``; float32 products use all bits instead of the 19 of TF32."""
    if tl.float32 == DTYPE:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def scale_pointers(pointer, tile, tile_offset, NUM_GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers ``[BLOCK_N]`` to the scales (or offsets) of the first group."""
    n = tile_offset + tl.arange(0, BLOCK_N)
    if BLOCK_N > 64:
        return pointer + (tile + n // 64) * (NUM_GROUPS * 64) + n % 64
    return pointer + tile * (NUM_GROUPS * 64) + n


@triton.jit
def group_index(chunk, span, LAYOUT: tl.constexpr):
    """Group of the inputs of a span of a chunk, written so that the compiler sees how groups follow each other."""
    size: tl.constexpr = LAYOUT.qvalues_per_word * 16
    if size % LAYOUT.group_size == 0:
        return chunk * (size // LAYOUT.group_size) + span * LAYOUT.scale_span // LAYOUT.group_size
    return (chunk * size + span * LAYOUT.scale_span) // LAYOUT.group_size


@triton.jit
def load_scales(pointers, chunk, stop, LAYOUT: tl.constexpr):
    """Scales of a chunk, one ``[BLOCK_N]`` for each span; undefined for a chunk at or past ``stop``."""
    SPANS: tl.constexpr = LAYOUT.qvalues_per_word * 16 // LAYOUT.scale_span
    scales = ()
    for span in tl.static_range(SPANS):
        scales = scales + (tl.load(pointers + group_index(chunk, span, LAYOUT) * 64, mask=chunk < stop),)
    return scales


@triton.jit
def prefetch_scales(pointer, tile, start, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Prefetches the scales from chunk ``start`` on into the L2 cache.

    Triton pipelines the loads of a product's operands several iterations ahead. Scales are too small for that: they are
    loaded one iteration before their use, which does not hide the latency of memory.
    """
    NUM_GROUPS: tl.constexpr = LAYOUT.num_groups
    size: tl.constexpr = LAYOUT.qvalues_per_word * 16
    group = start * size // LAYOUT.group_size + tl.arange(0, triton.next_power_of_2(NUM_GROUPS))
    line = tl.minimum(group, NUM_GROUPS - 1)
    for t in tl.static_range((BLOCK_N + 63) // 64):
        address = (pointer + (tile + t) * (NUM_GROUPS * 64) + line * 64).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def packed_offsets(tile, tile_offset, NUM_CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets ``[16, BLOCK_N]`` of the first chunk's words; more than 64 outputs span consecutive tiles."""
    r, n = tl.arange(0, 16), tl.arange(0, BLOCK_N)
    if BLOCK_N > 64:
        return (tile + n // 64)[None, :] * (NUM_CHUNKS * 16 * 64) + r[:, None] * 64 + (n % 64)[None, :]
    return tile * (NUM_CHUNKS * 16 * 64) + tile_offset + r[:, None] * 64 + n[None, :]


@triton.jit
def dot_tile(
    acc, x, rows, row_mask, input_scales, weight, LAYOUT: tl.constexpr, tile, tile_offset, start, stop,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_INPUT_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """``acc + (x[rows] * input_scales) @ weight[tile].T`` over some of the chunks: float32 ``[BLOCK_M, BLOCK_N]``.

    Args:
        acc: float32 ``[BLOCK_M, BLOCK_N]``.
        x: Pointer to rows of K values, STRIDE apart.
        rows: int ``[BLOCK_M]``, indices of rows.
        row_mask: Rows to read; the others count as zero.
        input_scales: Pointer to the scales of the inputs ``[K]``, if HAS_INPUT_SCALES.
        weight: :class:`TilePointers` of the whole stack.
        LAYOUT: Layout of the weight.
        tile: Index of the tile, or of the first one for more than 64 outputs.
        tile_offset: First output in the tile; 0 for 64 outputs or more.
        start: First chunk.
        stop: End of the chunks.
        STRIDE: Distance between rows of x.
        BLOCK_M: Rows of the product.
        BLOCK_N: Outputs of the product.
        HAS_INPUT_SCALES: Whether the inputs have scales.
        DTYPE: Dtype of the factors; sums are float32.
    """
    K: tl.constexpr = LAYOUT.inputs
    GROUP_SIZE: tl.constexpr = LAYOUT.group_size
    HAS_OFFSETS: tl.constexpr = LAYOUT.has_offsets
    NUM_GROUPS: tl.constexpr = LAYOUT.num_groups
    r = tl.arange(0, 16)
    size: tl.constexpr = LAYOUT.qvalues_per_word * 16
    spans: tl.constexpr = size // LAYOUT.scale_span
    planes: tl.constexpr = LAYOUT.scale_span // 16
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    packed = weight.packed + packed_offsets(tile, tile_offset, LAYOUT.num_chunks, BLOCK_N)
    if GROUP_SIZE:
        if tl.bfloat16 == DTYPE:
            prefetch_scales(weight.scales, tile, start, LAYOUT, BLOCK_N)
        scales = scale_pointers(weight.scales, tile, tile_offset, NUM_GROUPS, BLOCK_N)
        scale = load_scales(scales, start, stop, LAYOUT)
    for c in range(start, stop):
        words = tl.load(packed + c * (16 * 64), eviction_policy="evict_first")
        next_scale = ()
        for span in tl.static_range(spans):
            span_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GROUP_SIZE else acc
            for j in tl.static_range(planes):
                k = c * size + (span * planes + j) * 16 + r
                mask = row_mask[:, None] & (k < K)[None, :] if K % size else row_mask[:, None]
                xs = tl.load(x + rows[:, None] * STRIDE + k[None, :], mask=mask, other=0.0).to(tl.float32)
                if HAS_INPUT_SCALES:
                    xs = xs * tl.load(input_scales + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
                rounded = xs.to(DTYPE)
                ws = dequant_plane(words, span * planes + j, LAYOUT, DTYPE)
                span_acc = dot_accumulate(rounded, ws, span_acc, DTYPE)
                if HAS_OFFSETS:
                    row_sum += tl.sum(xs, axis=1)
            if GROUP_SIZE:
                acc += span_acc * scale[span].to(tl.float32)[None, :]
                # Loaded after its predecessor's use, so that it takes that register and needs no move.
                group = group_index(c + 1, span, LAYOUT) * 64
                next_scale = next_scale + (tl.load(scales + group, mask=c + 1 < stop),)
                if HAS_OFFSETS:
                    group = group_index(c, span, LAYOUT) * 64
                    row_sums = row_sum[:, None]
                    offsets = scale_pointers(weight.offsets, tile, tile_offset, NUM_GROUPS, BLOCK_N)
                    acc += row_sums * tl.load(offsets + group)[None, :]
                    row_sum = tl.zeros((BLOCK_M,), tl.float32)
            else:
                acc = span_acc
        if GROUP_SIZE:
            scale = next_scale
    if LAYOUT.has_scales and not GROUP_SIZE:
        acc = acc * tl.load(scale_pointers(weight.scales, tile, tile_offset, 1, BLOCK_N)).to(tl.float32)[None, :]
        if HAS_OFFSETS:
            acc += row_sum[:, None] * tl.load(scale_pointers(weight.offsets, tile, tile_offset, 1, BLOCK_N))[None, :]
    return acc


@triton.jit
def dot_pair(
    x, rows, row_mask, gate, up, LAYOUT: tl.constexpr, tile, tile_offset, stop, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Products ``x[rows] @ gate[tile].T`` and ``x[rows] @ up[tile].T`` over the chunks up to ``stop``.

    Both weights have one layout, so the inputs are read once; see :func:`dot_tile` for the arguments.
    """
    K: tl.constexpr = LAYOUT.inputs
    GROUP_SIZE: tl.constexpr = LAYOUT.group_size
    HAS_OFFSETS: tl.constexpr = LAYOUT.has_offsets
    NUM_GROUPS: tl.constexpr = LAYOUT.num_groups
    r = tl.arange(0, 16)
    size: tl.constexpr = LAYOUT.qvalues_per_word * 16
    spans: tl.constexpr = size // LAYOUT.scale_span
    planes: tl.constexpr = LAYOUT.scale_span // 16
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    packed = packed_offsets(tile, tile_offset, LAYOUT.num_chunks, BLOCK_N)
    if GROUP_SIZE:
        if tl.bfloat16 == DTYPE:
            prefetch_scales(gate.scales, tile, 0, LAYOUT, BLOCK_N)
            prefetch_scales(up.scales, tile, 0, LAYOUT, BLOCK_N)
        gate_scales = scale_pointers(gate.scales, tile, tile_offset, NUM_GROUPS, BLOCK_N)
        up_scales = scale_pointers(up.scales, tile, tile_offset, NUM_GROUPS, BLOCK_N)
        gate_scale = load_scales(gate_scales, 0, stop, LAYOUT)
        up_scale = load_scales(up_scales, 0, stop, LAYOUT)
    for c in range(stop):
        gate_words = tl.load(gate.packed + packed + c * (16 * 64), eviction_policy="evict_first")
        up_words = tl.load(up.packed + packed + c * (16 * 64), eviction_policy="evict_first")
        next_gate_scale, next_up_scale = (), ()
        for span in tl.static_range(spans):
            gate_span = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GROUP_SIZE else gate_acc
            up_span = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GROUP_SIZE else up_acc
            for j in tl.static_range(planes):
                k = c * size + (span * planes + j) * 16 + r
                mask = row_mask[:, None] & (k < K)[None, :] if K % size else row_mask[:, None]
                xs = tl.load(x + rows[:, None] * STRIDE + k[None, :], mask=mask, other=0.0)
                gate_ws = dequant_plane(gate_words, span * planes + j, LAYOUT, DTYPE)
                gate_span = dot_accumulate(xs.to(DTYPE), gate_ws, gate_span, DTYPE)
                up_ws = dequant_plane(up_words, span * planes + j, LAYOUT, DTYPE)
                up_span = dot_accumulate(xs.to(DTYPE), up_ws, up_span, DTYPE)
                if HAS_OFFSETS:
                    row_sum += tl.sum(xs.to(tl.float32), axis=1)
            if GROUP_SIZE:
                gate_acc += gate_span * gate_scale[span].to(tl.float32)[None, :]
                up_acc += up_span * up_scale[span].to(tl.float32)[None, :]
                group = group_index(c + 1, span, LAYOUT) * 64
                next_gate_scale = next_gate_scale + (tl.load(gate_scales + group, mask=c + 1 < stop),)
                next_up_scale = next_up_scale + (tl.load(up_scales + group, mask=c + 1 < stop),)
                if HAS_OFFSETS:
                    group = group_index(c, span, LAYOUT) * 64
                    row_sums = row_sum[:, None]
                    offsets = scale_pointers(gate.offsets, tile, tile_offset, NUM_GROUPS, BLOCK_N)
                    gate_acc += row_sums * tl.load(offsets + group)[None, :]
                    row_sums = row_sum[:, None]
                    offsets = scale_pointers(up.offsets, tile, tile_offset, NUM_GROUPS, BLOCK_N)
                    up_acc += row_sums * tl.load(offsets + group)[None, :]
                    row_sum = tl.zeros((BLOCK_M,), tl.float32)
            else:
                gate_acc, up_acc = gate_span, up_span
        if GROUP_SIZE:
            gate_scale, up_scale = next_gate_scale, next_up_scale
    if LAYOUT.has_scales and not GROUP_SIZE:
        gate_scale = tl.load(scale_pointers(gate.scales, tile, tile_offset, 1, BLOCK_N)).to(tl.float32)
        gate_acc = gate_acc * gate_scale[None, :]
        up_scale = tl.load(scale_pointers(up.scales, tile, tile_offset, 1, BLOCK_N)).to(tl.float32)
        up_acc = up_acc * up_scale[None, :]
        if HAS_OFFSETS:
            row_sums = row_sum[:, None]
            gate_acc += row_sums * tl.load(scale_pointers(gate.offsets, tile, tile_offset, 1, BLOCK_N))[None, :]
            row_sums = row_sum[:, None]
            up_acc += row_sums * tl.load(scale_pointers(up.offsets, tile, tile_offset, 1, BLOCK_N))[None, :]
    return gate_acc, up_acc


@triton.jit
def load_sum_sq(sum_sq, rows, row_mask, LAYOUT: tl.constexpr):
    """Partial sums of squares ``[BLOCK_M, blocks]`` of rows. Loading them before a loop hides their latency."""
    b = tl.arange(0, triton.next_power_of_2(LAYOUT.num_blocks))
    mask = row_mask[:, None] & (b < LAYOUT.num_blocks)[None, :]
    return tl.load(sum_sq + rows[:, None] * LAYOUT.stride + LAYOUT.first_block + b[None, :], mask=mask, other=0.0)


@triton.jit
def inv_rms(partials, LAYOUT: tl.constexpr, WIDTH: tl.constexpr):
    """``1 / rms`` of rows of WIDTH values, from :func:`load_sum_sq`."""
    return tl.rsqrt(tl.sum(partials, axis=1) / WIDTH + LAYOUT.eps)
