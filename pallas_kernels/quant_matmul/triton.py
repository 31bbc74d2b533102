"""Kernel of products of few rows with a quantized matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import TilePointers, dot_tile, inv_rms, load_sum_sq


@triton.jit
def fused_linear_kernel(
    x, sum_sq, layer_index, packed, scales, offsets, second_packed, second_scales, second_offsets, residual, next_norm,
    counters_in, out, scaled, out_sum_sq, partials, counters,
    M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, WEIGHT: tl.constexpr, SECOND: tl.constexpr,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_NEXT_NORM: tl.constexpr, NEXT_NORM_OFFSET: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``out = inv_rms(x) * (x @ w[layer].T) + residual``; grid (blocks of rows, splits of inputs, blocks of outputs).

    The second weight has the outputs past those of the first. The program that finishes a block of outputs last adds
    the splits, always in the same order. ``layer_index`` is that of the weights; NEXT_NORM_OFFSET more is that of
    ``next_norm``.
    """
    # Consecutive programs have the same outputs, so that blocks of rows find each other's weights in the cache.
    pm, split, pn = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    layer = tl.load(layer_index).to(tl.int64)
    BLOCKS_PER_TILE: tl.constexpr = 64 // BLOCK_N  # written so that the compiler sees the alignment within a tile
    CHUNKS: tl.constexpr = WEIGHT.num_chunks
    FIRST_N: tl.constexpr = WEIGHT.outputs
    HAS_NORM: tl.constexpr = NORM.num_blocks > 0
    chunks_per_split: tl.constexpr = (CHUNKS + SPLIT_K - 1) // SPLIT_K
    start, stop = split * chunks_per_split, tl.minimum(split * chunks_per_split + chunks_per_split, CHUNKS)
    n = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (n < N)[None, :]
    position = rows[:, None] * N + n[None, :]
    # Loads for the epilogue are issued before the products, which hides their latency.
    if HAS_NORM:
        norm_partials = load_sum_sq(sum_sq, rows, row_mask, NORM)
    if HAS_RESIDUAL:
        stream = tl.load(residual + position, mask=mask, other=0.0).to(tl.float32)
    if HAS_NEXT_NORM:
        norm = tl.load(next_norm + (layer + NEXT_NORM_OFFSET) * N + n, mask=n < N, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if pn * BLOCK_N < FIRST_N:
        acc = dot_tile(
            acc, x, rows, row_mask, x, TilePointers(packed, scales, offsets), WEIGHT,
            layer * WEIGHT.num_tiles + pn // BLOCKS_PER_TILE, (pn % BLOCKS_PER_TILE) * BLOCK_N, start, stop, STRIDE,
            BLOCK_M, BLOCK_N, False, DTYPE,
        )  # fmt: skip
    elif FIRST_N < N:
        second_pn = pn - FIRST_N // BLOCK_N
        acc = dot_tile(
            acc, x, rows, row_mask, x, TilePointers(second_packed, second_scales, second_offsets), SECOND,
            layer * SECOND.num_tiles + second_pn // BLOCKS_PER_TILE, (second_pn % BLOCKS_PER_TILE) * BLOCK_N, start,
            stop, STRIDE, BLOCK_M, BLOCK_N, False, DTYPE,
        )  # fmt: skip
    is_last = True
    if SPLIT_K > 1:
        tl.store(partials + split * M * N + position, acc, mask=mask)
        tl.debug_barrier()
        counter = counters + pm * tl.num_programs(2) + pn
        is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
        if is_last:
            tl.store(counter, 0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in tl.static_range(SPLIT_K):
                acc += tl.load(partials + i * M * N + position, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if HAS_NORM:
            acc = acc * inv_rms(norm_partials, NORM, WEIGHT.inputs)[:, None]
        if HAS_RESIDUAL:
            acc += stream
        tl.store(out + position, acc.to(out.dtype.element_ty), mask=mask)
        if HAS_NEXT_NORM:
            tl.store(scaled + position, (acc * norm[None, :]).to(scaled.dtype.element_ty), mask=mask)
        valid = tl.where(mask, acc, 0.0)
        tl.store(out_sum_sq + rows * tl.num_programs(2) + pn, tl.sum(valid * valid, axis=1), mask=row_mask)
