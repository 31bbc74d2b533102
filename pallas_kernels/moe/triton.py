"""Mixture of experts for few tokens.

A program of :func:`gate_up_kernel` or :func:`down_kernel` works on a tile of one expert. For very few tokens it does so
for one (token, expert) pair, and nothing is sorted: which expert that is the first kernel finds out itself, from the
router's logits: 64 numbers to look at, against another kernel to wait for. For more tokens :func:`dispatch_kernel` goes
before, and the pairs of an expert are read together, so that its weights are read once. The shared expert takes part
as one more slot, for all tokens at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import dot_pair, dot_tile, inv_rms, load_sum_sq


@triton.jit
def select_expert(
    logits, bias, token, slot, E: tl.constexpr, X: tl.constexpr, NORMALIZED: tl.constexpr, FACTOR: tl.constexpr
):  # fmt: skip
    """Number and weight of the slot-th best expert of a token; of equal ones the first comes first."""
    wide: tl.constexpr = triton.next_power_of_2(E)
    e = tl.arange(0, wide)
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * E + e, mask=e < E, other=0.0)))
    choice = tl.where(e < E, score + tl.load(bias + e, mask=e < E, other=0.0), float("-inf"))
    choice = tl.where(choice != choice, float("inf"), choice)  # a NaN is chosen, and so seen
    number = tl.full((), 0, tl.int32)
    weight = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(X):
        best = tl.argmax(choice, axis=0).to(tl.int32)
        value = tl.sum(tl.where(e == best, score, 0.0), axis=0)
        total += value
        number = tl.where(slot == i, best, number)
        weight = tl.where(slot == i, value, weight)
        choice = tl.where(e == best, float("-inf"), choice)
    if NORMALIZED:
        weight = weight / (total + 1e-20)
    return number, weight * FACTOR


@triton.jit
def dispatch_kernel(
    logits, bias, place, owners, sizes, pairs, weights,
    M: tl.constexpr, E: tl.constexpr, X: tl.constexpr, NORMALIZED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCKS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The pairs in blocks of one expert each, in the order of experts and then of tokens; one program."""
    m, e = tl.arange(0, triton.next_power_of_2(M)), tl.arange(0, triton.next_power_of_2(E))
    inside = (m < M)[:, None] & (e < E)[None, :]
    bias += tl.load(place).to(tl.int64) * E
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + m[:, None] * E + e[None, :], mask=inside, other=0.0)))
    choice = tl.where((e < E)[None, :], score + tl.load(bias + e, mask=e < E, other=0.0)[None, :], float("-inf"))
    choice = tl.where(choice != choice, float("inf"), choice)  # a NaN is chosen, and so seen
    slot = tl.full(score.shape, -1, tl.int32)
    total = tl.zeros(m.shape, tl.float32)
    for i in tl.static_range(X):
        best = tl.argmax(choice, axis=1).to(tl.int32)
        hit = e[None, :] == best[:, None]
        slot = tl.where(hit, i, slot)
        total += tl.sum(tl.where(hit, score, 0.0), axis=1)
        choice = tl.where(hit, float("-inf"), choice)
    taken = inside & (slot >= 0)
    pair = m[:, None] * X + slot
    weight = score / (total[:, None] + 1e-20) if NORMALIZED else score
    tl.store(weights + pair, weight * FACTOR, mask=taken)
    one = taken.to(tl.int32)
    rank = tl.cumsum(one, axis=0) - one
    count = tl.sum(one, axis=0)
    end = tl.cumsum(tl.cdiv(count, BM), axis=0)
    first = end - tl.cdiv(count, BM)
    tl.store(pairs + first[None, :] * BM + rank, pair, mask=taken)
    b = tl.arange(0, triton.next_power_of_2(BLOCKS))
    mine = (first[None, :] <= b[:, None]) & (b[:, None] < end[None, :])
    owner = tl.sum(tl.where(mine, e[None, :], 0), axis=1)
    left = tl.sum(tl.where(mine, count[None, :] - (b[:, None] - first[None, :]) * BM, 0), axis=1)
    tl.store(owners + b, owner, mask=b < BLOCKS)
    tl.store(sizes + b, tl.minimum(left, BM), mask=b < BLOCKS)


@triton.jit
def load_pairs(who, sizes, pairs, CHUNKS: tl.constexpr, BM: tl.constexpr, SORTED: tl.constexpr):
    """The pairs of a program, which of them are there, and how many chunks of weights to read: none for no pair."""
    r = tl.arange(0, BM)
    if SORTED:
        size = tl.load(sizes + who)
        here = r < size
        return tl.load(pairs + who * BM + r, mask=here, other=0), here, tl.where(size > 0, CHUNKS, 0)
    return who + 0 * r, r == 0, CHUNKS


@triton.jit
def swiglu(gate, up, factor):
    """``silu(gate) * up`` of products that still lack a factor per row."""
    gate, up = gate * factor[:, None], up * factor[:, None]
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gate_up_kernel(
    x, squares, place, logits, bias, owners_in, sizes, pairs, g_words, g_scales, g_offsets, u_words, u_scales,
    u_offsets, sg_words, sg_scales, sg_offsets, su_words, su_scales, su_offsets, out, owners, weights,
    BLOCKS: tl.constexpr, SORTED: tl.constexpr, M: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    X: tl.constexpr, NORMALIZED: tl.constexpr,
    FACTOR: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, F: tl.constexpr,
    TILES: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr,
    PER_WORD: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr, SF: tl.constexpr,
    S_TILES: tl.constexpr, S_CHUNKS: tl.constexpr, S_GROUPS: tl.constexpr, S_GROUP: tl.constexpr, S_SUB: tl.constexpr,
    S_PER_WORD: tl.constexpr, S_KIND: tl.constexpr, S_SCALED: tl.constexpr, S_OFFSET: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``silu(gate(x)) * up(x)``; programs (block of the width, block of pairs or of rows of the shared expert).

    First in ``out`` come the M * X rows of the pairs, then the M of the shared expert. If the pairs are not sorted,
    each is a block, and the number and weight of its expert are left behind.
    """
    pn, who = tl.program_id(0), tl.program_id(1)
    r, n = tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    layer = tl.load(place).to(tl.int64)
    HALVES: tl.constexpr = 64 // BN  # written so that the compiler sees how places in a tile are aligned
    first = (pn % HALVES) * BN
    if who < BLOCKS:
        if pn * BN < F:
            if SORTED:
                expert = tl.load(owners_in + who)
            else:
                expert, weight = select_expert(logits, bias + layer * E, who // X, who % X, E, X, NORMALIZED, FACTOR)
                if pn == 0:
                    tl.store(owners + who, expert)
                    tl.store(weights + who, weight)
            pair, here, stop = load_pairs(who, sizes, pairs, CHUNKS, BM, SORTED)
            rows = pair // X
            parts = load_sum_sq(squares, rows, here, 0, PARTS, PARTS)
            gate, up = dot_pair(
                x, rows, here, g_words, g_scales, g_offsets, u_words, u_scales, u_offsets,
                (layer * E + expert) * TILES + pn // HALVES, first, stop, K, K, CHUNKS, GROUPS, GROUP, SUB,
                PER_WORD, KIND, BM, BN, SCALED, OFFSET, DT,
            )  # fmt: skip
            value = swiglu(gate, up, inv_rms(parts, EPS, K))
            to = out + pair[:, None] * F + n[None, :]
            tl.store(to, value.to(out.dtype.element_ty), mask=here[:, None] & (n < F)[None, :])
    else:
        if pn * BN < SF:
            rows = (who - BLOCKS) * BM + r
            here = rows < M
            parts = load_sum_sq(squares, rows, here, 0, PARTS, PARTS)
            gate, up = dot_pair(
                x, rows, here, sg_words, sg_scales, sg_offsets, su_words, su_scales, su_offsets,
                layer * S_TILES + pn // HALVES, first, S_CHUNKS, K, K, S_CHUNKS, S_GROUPS, S_GROUP, S_SUB,
                S_PER_WORD, S_KIND, BM, BN, S_SCALED, S_OFFSET, DT,
            )  # fmt: skip
            value = swiglu(gate, up, inv_rms(parts, EPS, K))
            to = out + M * X * F + rows[:, None] * SF + n[None, :]
            tl.store(to, value.to(out.dtype.element_ty), mask=here[:, None] & (n < SF)[None, :])


@triton.jit
def down_kernel(
    h, owners, sizes, pairs, weights, place, words, scales, offsets, s_words, s_scales, s_offsets, residual,
    next_norm, counters_in, out, scaled, out_squares, partial, counters,
    BLOCKS: tl.constexpr, SORTED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, X: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, PER_WORD: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr, SF: tl.constexpr, S_TILES: tl.constexpr,
    S_CHUNKS: tl.constexpr, S_GROUPS: tl.constexpr, S_GROUP: tl.constexpr, S_SUB: tl.constexpr,
    S_PER_WORD: tl.constexpr, S_KIND: tl.constexpr, S_SCALED: tl.constexpr, S_OFFSET: tl.constexpr,
    RESIDUAL: tl.constexpr, NEXT: tl.constexpr, NEXT_FROM: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``residual + sum of weight * down(h)``; programs (block of outputs, of pairs or of rows of the shared expert).

    The program that finishes a block of outputs last adds the experts, always in the same order. ``place`` has the
    index of the layer; NEXT_FROM more is that of ``next_norm`` in its own stack.
    """
    pn, who = tl.program_id(0), tl.program_id(1)
    r, n = tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    layer = tl.load(place).to(tl.int64)
    HALVES: tl.constexpr = 64 // BN  # written so that the compiler sees how places in a tile are aligned
    first = (pn % HALVES) * BN
    zero = tl.zeros((BM, BN), tl.float32)
    # What the end needs is asked for before the way there.
    if NEXT:
        norm = tl.load(next_norm + (layer + NEXT_FROM) * N + n, mask=n < N, other=0.0).to(tl.float32)
    if RESIDUAL:
        stream = tl.load(residual + r[:, None] * N + n[None, :], mask=(r < M)[:, None] & (n < N)[None, :], other=0.0)
    if who < BLOCKS:
        pair, here, stop = load_pairs(who, sizes, pairs, CHUNKS, BM, SORTED)
        weight = tl.load(weights + pair, mask=here, other=0.0)
        acc = dot_tile(
            zero, h, pair, here, h, words, scales, offsets,
            (layer * E + tl.load(owners + who)) * TILES + pn // HALVES, first, 0, stop, F, F, CHUNKS, GROUPS, GROUP,
            SUB, PER_WORD, KIND, BM, BN, False, SCALED, OFFSET, DT,
        )  # fmt: skip
        to = partial + ((pair % X) * M + pair // X)[:, None] * N + n[None, :]
        tl.store(to, acc * weight[:, None], mask=here[:, None] & (n < N)[None, :])
    else:
        rows = (who - BLOCKS) * BM + r
        acc = dot_tile(
            zero, h + M * X * F, rows, rows < M, h, s_words, s_scales, s_offsets,
            layer * S_TILES + pn // HALVES, first, 0, S_CHUNKS, SF, SF, S_CHUNKS, S_GROUPS, S_GROUP, S_SUB,
            S_PER_WORD, S_KIND, BM, BN, False, S_SCALED, S_OFFSET, DT,
        )  # fmt: skip
        to = partial + (X * M + rows)[:, None] * N + n[None, :]
        tl.store(to, acc, mask=(rows < M)[:, None] & (n < N)[None, :])
    tl.debug_barrier()
    if tl.atomic_add(counters + pn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.store(counters + pn, 0)
        for block in range(tl.cdiv(M, BM)):
            rows = block * BM + r
            inside = (rows < M)[:, None] & (n < N)[None, :]
            at = rows[:, None] * N + n[None, :]
            value = zero
            if RESIDUAL:
                value = stream if M <= BM else tl.load(residual + at, mask=inside, other=0.0)
            for slot in tl.static_range(X + (1 if SF else 0)):
                value += tl.load(partial + slot * M * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out + at, value, mask=inside)
            if NEXT:
                tl.store(scaled + at, (value * norm[None, :]).to(scaled.dtype.element_ty), mask=inside)
            kept = tl.where(inside, value, 0.0)
            tl.store(out_squares + rows * tl.num_programs(0) + pn, tl.sum(kept * kept, axis=1), mask=rows < M)
