"""Kernels of a mixture of experts for few tokens.

A program of :func:`gate_up_kernel` or :func:`down_kernel` computes a block of outputs of one expert. For very few
tokens it does so for one (token, expert) pair, and nothing is sorted: the first kernel selects the expert itself from
the router's logits, which means reading 64 numbers instead of waiting for another kernel. For more tokens
:func:`dispatch_kernel` runs before, and the pairs of an expert share a program, so that its weights are read once. The
shared expert takes part as one more slot, for all tokens at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import TilePointers, dot_pair, dot_tile, inv_rms, load_sum_sq


@triton.jit
def select_expert(logits, bias, token, slot, ROUTER: tl.constexpr):
    """Id and weight of the slot-th best expert of a token; of equals, the first comes first."""
    E: tl.constexpr = ROUTER.experts
    X: tl.constexpr = ROUTER.experts_per_token
    padded: tl.constexpr = triton.next_power_of_2(E)
    e = tl.arange(0, padded)
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * E + e, mask=e < E, other=0.0)))
    choice = tl.where(e < E, score + tl.load(bias + e, mask=e < E, other=0.0), float("-inf"))
    choice = tl.where(choice != choice, float("inf"), choice)  # a NaN is selected, which makes it visible
    expert = tl.full((), 0, tl.int32)
    weight = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(X):
        best = tl.argmax(choice, axis=0).to(tl.int32)
        value = tl.sum(tl.where(e == best, score, 0.0), axis=0)
        total += value
        expert = tl.where(slot == i, best, expert)
        weight = tl.where(slot == i, value, weight)
        choice = tl.where(e == best, float("-inf"), choice)
    if ROUTER.normalize_weights:
        weight = weight / (total + 1e-20)
    return expert, weight * ROUTER.scaling_factor


@triton.jit
def dispatch_kernel(
    logits, bias, layer_index, expert_ids, block_sizes, pair_ids, weights,
    M: tl.constexpr, ROUTER: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The pairs in blocks of one expert each, ordered by expert and then by token; one program."""
    E: tl.constexpr = ROUTER.experts
    X: tl.constexpr = ROUTER.experts_per_token
    m, e = tl.arange(0, triton.next_power_of_2(M)), tl.arange(0, triton.next_power_of_2(E))
    mask = (m < M)[:, None] & (e < E)[None, :]
    bias += tl.load(layer_index).to(tl.int64) * E
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + m[:, None] * E + e[None, :], mask=mask, other=0.0)))
    choice = tl.where((e < E)[None, :], score + tl.load(bias + e, mask=e < E, other=0.0)[None, :], float("-inf"))
    choice = tl.where(choice != choice, float("inf"), choice)  # a NaN is selected, which makes it visible
    slot = tl.full(score.shape, -1, tl.int32)
    total = tl.zeros(m.shape, tl.float32)
    for i in tl.static_range(X):
        best = tl.argmax(choice, axis=1).to(tl.int32)
        is_best = e[None, :] == best[:, None]
        slot = tl.where(is_best, i, slot)
        total += tl.sum(tl.where(is_best, score, 0.0), axis=1)
        choice = tl.where(is_best, float("-inf"), choice)
    is_selected = mask & (slot >= 0)
    pair = m[:, None] * X + slot
    weight = score / (total[:, None] + 1e-20) if ROUTER.normalize_weights else score
    tl.store(weights + pair, weight * ROUTER.scaling_factor, mask=is_selected)
    selected = is_selected.to(tl.int32)
    rank = tl.cumsum(selected, axis=0) - selected
    pairs_per_expert = tl.sum(selected, axis=0)
    end = tl.cumsum(tl.cdiv(pairs_per_expert, BLOCK_M), axis=0)
    first = end - tl.cdiv(pairs_per_expert, BLOCK_M)
    tl.store(pair_ids + first[None, :] * BLOCK_M + rank, pair, mask=is_selected)
    b = tl.arange(0, triton.next_power_of_2(NUM_BLOCKS))
    is_owner = (first[None, :] <= b[:, None]) & (b[:, None] < end[None, :])
    owner = tl.sum(tl.where(is_owner, e[None, :], 0), axis=1)
    remaining = pairs_per_expert[None, :] - (b[:, None] - first[None, :]) * BLOCK_M
    remaining = tl.sum(tl.where(is_owner, remaining, 0), axis=1)
    tl.store(expert_ids + b, owner, mask=b < NUM_BLOCKS)
    tl.store(block_sizes + b, tl.minimum(remaining, BLOCK_M), mask=b < NUM_BLOCKS)


@triton.jit
def load_pairs(
    block, block_sizes, pair_ids, NUM_CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, IS_SORTED: tl.constexpr
):  # fmt: skip
    """Pairs of a block, the mask of those that exist, and the chunks of weights to read: none for no pair."""
    r = tl.arange(0, BLOCK_M)
    if IS_SORTED:
        size = tl.load(block_sizes + block)
        mask = r < size
        return tl.load(pair_ids + block * BLOCK_M + r, mask=mask, other=0), mask, tl.where(size > 0, NUM_CHUNKS, 0)
    return block + 0 * r, r == 0, NUM_CHUNKS


@triton.jit
def swiglu(gate, up, row_scale):
    """``silu(gate) * up`` of products that are still to be multiplied by a scale per row."""
    gate, up = gate * row_scale[:, None], up * row_scale[:, None]
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gate_up_kernel(
    x, sum_sq, layer_index, logits, bias, expert_ids_in, block_sizes, pair_ids, gate_packed, gate_scales, gate_offsets,
    up_packed, up_scales, up_offsets, shared_gate_packed, shared_gate_scales, shared_gate_offsets, shared_up_packed,
    shared_up_scales, shared_up_offsets, out, expert_ids, weights,
    M: tl.constexpr, ROUTER: tl.constexpr, NORM: tl.constexpr, NUM_BLOCKS: tl.constexpr, IS_SORTED: tl.constexpr,
    WEIGHT: tl.constexpr, SHARED: tl.constexpr, SHARED_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``silu(gate(x)) * up(x)``; grid (blocks of outputs, blocks of pairs and then of rows of the shared expert).

    ``out`` has the M * X rows of the pairs, followed by the M rows of the shared expert. If the pairs are not sorted,
    each is a block, and the kernel writes the id and weight of its expert.
    """
    E: tl.constexpr = ROUTER.experts
    X: tl.constexpr = ROUTER.experts_per_token
    K: tl.constexpr = WEIGHT.inputs
    F: tl.constexpr = WEIGHT.outputs
    pn, block = tl.program_id(0), tl.program_id(1)
    r, n = tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    layer = tl.load(layer_index).to(tl.int64)
    BLOCKS_PER_TILE: tl.constexpr = 64 // BLOCK_N  # written so that the compiler sees the alignment within a tile
    tile_offset = (pn % BLOCKS_PER_TILE) * BLOCK_N
    if block < NUM_BLOCKS:
        if pn * BLOCK_N < F:
            if IS_SORTED:
                expert = tl.load(expert_ids_in + block)
            else:
                expert, weight = select_expert(logits, bias + layer * E, block // X, block % X, ROUTER)
                if pn == 0:
                    tl.store(expert_ids + block, expert)
                    tl.store(weights + block, weight)
            pair, row_mask, stop = load_pairs(block, block_sizes, pair_ids, WEIGHT.num_chunks, BLOCK_M, IS_SORTED)
            rows = pair // X
            norm_partials = load_sum_sq(sum_sq, rows, row_mask, NORM)
            gate, up = dot_pair(
                x, rows, row_mask, TilePointers(gate_packed, gate_scales, gate_offsets),
                TilePointers(up_packed, up_scales, up_offsets), WEIGHT,
                (layer * E + expert) * WEIGHT.num_tiles + pn // BLOCKS_PER_TILE, tile_offset, stop, K, BLOCK_M, BLOCK_N,
                DTYPE,
            )  # fmt: skip
            value = swiglu(gate, up, inv_rms(norm_partials, NORM, K))
            target = out + pair[:, None] * F + n[None, :]
            tl.store(target, value.to(out.dtype.element_ty), mask=row_mask[:, None] & (n < F)[None, :])
    else:
        if pn * BLOCK_N < SHARED_WIDTH:
            rows = (block - NUM_BLOCKS) * BLOCK_M + r
            row_mask = rows < M
            norm_partials = load_sum_sq(sum_sq, rows, row_mask, NORM)
            gate, up = dot_pair(
                x, rows, row_mask, TilePointers(shared_gate_packed, shared_gate_scales, shared_gate_offsets),
                TilePointers(shared_up_packed, shared_up_scales, shared_up_offsets), SHARED,
                layer * SHARED.num_tiles + pn // BLOCKS_PER_TILE, tile_offset, SHARED.num_chunks, K, BLOCK_M, BLOCK_N,
                DTYPE,
            )  # fmt: skip
            value = swiglu(gate, up, inv_rms(norm_partials, NORM, K))
            target = out + M * X * F + rows[:, None] * SHARED_WIDTH + n[None, :]
            tl.store(target, value.to(out.dtype.element_ty), mask=row_mask[:, None] & (n < SHARED_WIDTH)[None, :])


@triton.jit
def down_kernel(
    h, expert_ids, block_sizes, pair_ids, weights, layer_index, packed, scales, offsets, shared_packed, shared_scales,
    shared_offsets, residual, next_norm, counters_in, out, scaled, out_sum_sq, partials, counters,
    M: tl.constexpr, ROUTER: tl.constexpr, NUM_BLOCKS: tl.constexpr, IS_SORTED: tl.constexpr, WEIGHT: tl.constexpr,
    SHARED: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NEXT_NORM: tl.constexpr,
    NEXT_NORM_OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``residual + sum of weight * down(h)``; grid (blocks of outputs, blocks of pairs and then of shared rows).

    The program that finishes a block of outputs last adds the experts, always in the same order. ``layer_index`` is
    that of the weights; NEXT_NORM_OFFSET more is that of ``next_norm``.
    """
    E: tl.constexpr = ROUTER.experts
    X: tl.constexpr = ROUTER.experts_per_token
    F: tl.constexpr = WEIGHT.inputs
    N: tl.constexpr = WEIGHT.outputs
    pn, block = tl.program_id(0), tl.program_id(1)
    r, n = tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    layer = tl.load(layer_index).to(tl.int64)
    BLOCKS_PER_TILE: tl.constexpr = 64 // BLOCK_N  # written so that the compiler sees the alignment within a tile
    tile_offset = (pn % BLOCKS_PER_TILE) * BLOCK_N
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Loads for the epilogue are issued before the products, which hides their latency.
    if HAS_NEXT_NORM:
        norm = tl.load(next_norm + (layer + NEXT_NORM_OFFSET) * N + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = tl.load(residual + r[:, None] * N + n[None, :], mask=(r < M)[:, None] & (n < N)[None, :], other=0.0)
    if block < NUM_BLOCKS:
        pair, row_mask, stop = load_pairs(block, block_sizes, pair_ids, WEIGHT.num_chunks, BLOCK_M, IS_SORTED)
        weight = tl.load(weights + pair, mask=row_mask, other=0.0)
        acc = dot_tile(
            zero, h, pair, row_mask, h, TilePointers(packed, scales, offsets), WEIGHT,
            (layer * E + tl.load(expert_ids + block)) * WEIGHT.num_tiles + pn // BLOCKS_PER_TILE, tile_offset, 0, stop,
            F, BLOCK_M, BLOCK_N, False, DTYPE,
        )  # fmt: skip
        target = partials + ((pair % X) * M + pair // X)[:, None] * N + n[None, :]
        tl.store(target, acc * weight[:, None], mask=row_mask[:, None] & (n < N)[None, :])
    else:
        rows = (block - NUM_BLOCKS) * BLOCK_M + r
        acc = dot_tile(
            zero, h + M * X * F, rows, rows < M, h,
            TilePointers(shared_packed, shared_scales, shared_offsets), SHARED,
            layer * SHARED.num_tiles + pn // BLOCKS_PER_TILE, tile_offset, 0, SHARED.num_chunks, SHARED.inputs, BLOCK_M,
            BLOCK_N, False, DTYPE,
        )  # fmt: skip
        target = partials + (X * M + rows)[:, None] * N + n[None, :]
        tl.store(target, acc, mask=(rows < M)[:, None] & (n < N)[None, :])
    tl.debug_barrier()
    if tl.atomic_add(counters + pn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.store(counters + pn, 0)
        for row_block in range(tl.cdiv(M, BLOCK_M)):
            rows = row_block * BLOCK_M + r
            mask = (rows < M)[:, None] & (n < N)[None, :]
            position = rows[:, None] * N + n[None, :]
            value = zero
            if HAS_RESIDUAL:
                value = stream if M <= BLOCK_M else tl.load(residual + position, mask=mask, other=0.0)
            for slot in tl.static_range(X + (1 if HAS_SHARED else 0)):
                value += tl.load(partials + slot * M * N + position, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(out + position, value, mask=mask)
            if HAS_NEXT_NORM:
                tl.store(scaled + position, (value * norm[None, :]).to(scaled.dtype.element_ty), mask=mask)
            valid = tl.where(mask, value, 0.0)
            tl.store(out_sum_sq + rows * tl.num_programs(0) + pn, tl.sum(valid * valid, axis=1), mask=rows < M)
