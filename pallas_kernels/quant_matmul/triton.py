"""Products of few rows with a quantized matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import dot_tile, inv_rms, load_sum_sq


@triton.jit
def fused_linear_kernel(
    x, squares, place, words, scales, offsets, o_words, o_scales, o_offsets, residual, next_norm, counters_in, out,
    scaled, out_squares, partial, counters,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, PER_WORD: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr, OTHER: tl.constexpr, O_TILES: tl.constexpr,
    O_GROUPS: tl.constexpr, O_GROUP: tl.constexpr, O_SUB: tl.constexpr, O_SCALED: tl.constexpr,
    O_OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, FACTOR: tl.constexpr,
    FIRST: tl.constexpr, PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr,
    NEXT: tl.constexpr, NEXT_FROM: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``out = factor(x) * (x @ w[layer].T) + residual``; programs (block of rows, share of inputs, block of outputs).

    From output OTHER on the matrix is the other one, of the same kind. The program that finishes a block of outputs
    last adds the shares, always in the same order. ``place`` has the index of the matrix in its stack; NEXT_FROM more
    is that of ``next_norm`` in its own.
    """
    # Blocks of rows are neighbors, so that they find each other's weights in the cache.
    pm, split, pn = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pm * BM + tl.arange(0, BM)
    here = rows < M
    layer = tl.load(place).to(tl.int64)
    HALVES: tl.constexpr = 64 // BN  # written so that the compiler sees how places in a tile are aligned
    share: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    start, stop = split * share, tl.minimum(split * share + share, CHUNKS)
    n = pn * BN + tl.arange(0, BN)
    inside = here[:, None] & (n < N)[None, :]
    at = rows[:, None] * N + n[None, :]
    # What the end needs is asked for before the way there.
    if FACTOR:
        parts = load_sum_sq(squares, rows, here, FIRST, PARTS, ALL_PARTS)
    if RESIDUAL:
        stream = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if NEXT:
        weight = tl.load(next_norm + (layer + NEXT_FROM) * N + n, mask=n < N, other=0.0).to(tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    if pn * BN < OTHER:
        acc = dot_tile(
            acc, x, rows, here, x, words, scales, offsets, layer * TILES + pn // HALVES, (pn % HALVES) * BN, start,
            stop, K, STRIDE, CHUNKS, GROUPS, GROUP, SUB, PER_WORD, KIND, BM, BN, False, SCALED, OFFSET, DT,
        )  # fmt: skip
    elif OTHER < N:
        po = pn - OTHER // BN
        acc = dot_tile(
            acc, x, rows, here, x, o_words, o_scales, o_offsets, layer * O_TILES + po // HALVES, (po % HALVES) * BN,
            start, stop, K, STRIDE, CHUNKS, O_GROUPS, O_GROUP, O_SUB, PER_WORD, KIND, BM, BN, False, O_SCALED,
            O_OFFSET, DT,
        )  # fmt: skip
    last = True
    if SPLITS > 1:
        tl.store(partial + split * M * N + at, acc, mask=inside)
        tl.debug_barrier()
        counter = counters + pm * tl.num_programs(2) + pn
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(counter, 0)
            acc = tl.zeros((BM, BN), tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(partial + i * M * N + at, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if FACTOR:
            acc = acc * inv_rms(parts, EPS, K)[:, None]
        if RESIDUAL:
            acc += stream
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
        if NEXT:
            tl.store(scaled + at, (acc * weight[None, :]).to(scaled.dtype.element_ty), mask=inside)
        kept = tl.where(inside, acc, 0.0)
        tl.store(out_squares + rows * tl.num_programs(2) + pn, tl.sum(kept * kept, axis=1), mask=here)
