"""Kernels that sample one token per row from its logits, without a sort.

The numbers that decide are compared, added in a fixed order, or functions of (seed, position, id) alone, so a row's
token depends on nothing but the row. NaN counts as -inf and +inf as the largest float, as everywhere in the sampler.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import TilePointers, dot_tile, inv_rms, load_sum_sq

MAX_FLOAT: tl.constexpr = tl.constexpr(3.4028234663852886e38)
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def threefry_rounds(x, y, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    """Four rounds of Threefry-2x32 with these rotations."""
    x += y
    y = ((y << a) | (y >> (32 - a))) ^ x
    x += y
    y = ((y << b) | (y >> (32 - b))) ^ x
    x += y
    y = ((y << c) | (y >> (32 - c))) ^ x
    x += y
    y = ((y << d) | (y >> (32 - d))) ^ x
    return x, y


@triton.jit
def gumbel_noise(high, low, position, ids):
    """Standard Gumbel noise of (seed, next position, id), the same as that of ``glm_jax.sampling.gumbel``."""
    parity = high ^ low ^ 0x1BD11BDA
    x, y = (position + 1).to(tl.uint32) + high, ids.to(tl.uint32) + low
    x, y = threefry_rounds(x, y, 13, 15, 26, 6)
    x, y = threefry_rounds(x + low, y + parity + 1, 17, 29, 16, 24)
    x, y = threefry_rounds(x + parity, y + high + 2, 13, 15, 26, 6)
    x, y = threefry_rounds(x + high, y + low + 3, 17, 29, 16, 24)
    x, y = threefry_rounds(x + low, y + parity + 4, 13, 15, 26, 6)
    bits = x + parity
    uniform = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    uniform = tl.minimum(uniform, 0.999999940395355225)
    # -log1p(-uniform): the quotient compensates for the rounding of the subtraction.
    complement = 1.0 - uniform
    exponential = tl.where(complement == 1.0, uniform, -tl.log(complement) * (uniform / (1.0 - complement)))
    return -tl.log(exponential)


@triton.jit
def clamp_finite(x):
    """NaN as -inf, +inf as the largest float, and -0 as 0."""
    x = tl.where(x != x, NEG_INF, tl.minimum(x, MAX_FLOAT))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def is_valid_id(ids, invalid_ids, VOCAB: tl.constexpr):
    """Which ids can be sampled."""
    valid = ids < VOCAB.valid_size
    if VOCAB.has_unused_ids:
        valid &= tl.load(invalid_ids + ids, mask=valid, other=1) == 0
    return valid


@triton.jit
def gap_below_top(top, score):
    """How far scores are below the highest."""
    return tl.where(top > NEG_INF, top, 0.0) - score


@triton.jit
def scaled_gaps(top, score, temperature):
    """How far scores are below the highest in units of the temperature, of which 0 counts as 1."""
    return tl.div_rn(gap_below_top(top, score), tl.where(temperature > 0.0, temperature, 1.0))


@triton.jit
def score_to_rank(score):
    """Scores as uint32 in the same order."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def rank_to_score(rank):
    """The score of a rank."""
    bits = tl.where((rank >> 31) != 0, rank ^ 0x80000000, rank ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def argmax_lowest_id(keys, ids, mask, NO_ID: tl.constexpr):
    """The highest key of each row and the lowest id that has it; -inf and NO_ID where the mask is empty."""
    best = tl.max(tl.where(mask, keys, NEG_INF), axis=1)
    return best, tl.min(tl.where(mask & (keys == best[:, None]), ids, NO_ID), axis=1)


@triton.jit
def lm_head_sample_kernel(
    x, sum_sq, packed, scales, offsets, invalid_ids, temperature, seeds, positions, counters_in,
    tokens, ok, block_scores, block_ids, counters,
    M: tl.constexpr, STRIDE: tl.constexpr, WEIGHT: tl.constexpr, VOCAB: tl.constexpr, NORM: tl.constexpr,
    HAS_RANDOM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Tokens of the logits ``inv_rms(x) * (x @ w.T)``; grid (blocks of rows, blocks of ids).

    A program writes the best of its ids, by keys that use its own highest score instead of the row's. The program that
    finishes a block of rows last chooses among these, WINDOW at a time. ROWS of a block's BLOCK_M rows exist.
    """
    V: tl.constexpr = VOCAB.width
    HAS_NORM: tl.constexpr = NORM.num_blocks > 0
    pm, pn = tl.program_id(0), tl.program_id(1)
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    BLOCKS_PER_TILE: tl.constexpr = 64 // BLOCK_N  # written so that the compiler sees the alignment within a tile
    if HAS_NORM:
        norm_partials = load_sum_sq(sum_sq, rows, rows < M, NORM)
    acc = dot_tile(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, rows, rows < M, x, TilePointers(packed, scales, offsets), WEIGHT,
        pn.to(tl.int64) // BLOCKS_PER_TILE, (pn % BLOCKS_PER_TILE) * BLOCK_N, 0, WEIGHT.num_chunks, STRIDE, BLOCK_M,
        BLOCK_N, False, DTYPE,
    )  # fmt: skip
    if HAS_NORM:
        acc = acc * inv_rms(norm_partials, NORM, WEIGHT.inputs)[:, None]
    if ROWS < BLOCK_M:  # one row: the rest of the block is padding
        acc = tl.sum(tl.where((rows == 0)[:, None], acc, 0.0), axis=0)[None, :]
    row = pm * BLOCK_M + tl.arange(0, ROWS)
    row_mask = row < M
    ids = (pn * BLOCK_N + tl.arange(0, BLOCK_N))[None, :] + 0 * row[:, None]
    valid = is_valid_id(ids, invalid_ids, VOCAB)
    score = tl.where(valid, clamp_finite(acc), NEG_INF)
    top = tl.max(score, axis=1)
    key = score
    if HAS_RANDOM:
        row_temperature = tl.load(temperature + row, mask=row_mask, other=0.0)[:, None]
        high = tl.load(seeds + 2 * row, mask=row_mask, other=0)[:, None]
        low = tl.load(seeds + 2 * row + 1, mask=row_mask, other=0)[:, None]
        noise = gumbel_noise(high, low, tl.load(positions + row, mask=row_mask, other=0)[:, None], ids)
        # An approximate quotient: an exact one is a subroutine, and this order is only that of the block.
        gap = gap_below_top(top[:, None], score) / tl.where(row_temperature > 0.0, row_temperature, 1.0)
        key = tl.where(row_temperature > 0.0, noise - gap, score)
    _, best = argmax_lowest_id(key, ids, valid, V)
    is_best = ids == best[:, None]
    position = row * tl.num_programs(1) + pn
    plane = M * tl.num_programs(1)
    tl.store(block_scores + position, tl.max(tl.where(is_best, score, NEG_INF), axis=1), mask=row_mask)
    if HAS_RANDOM:
        tl.store(block_scores + plane + position, tl.max(tl.where(is_best, noise, NEG_INF), axis=1), mask=row_mask)
        tl.store(block_scores + 2 * plane + position, top, mask=row_mask)
    is_broken = valid & ((acc != acc) | (acc == float("inf")))
    tl.store(block_ids + position, best, mask=row_mask)
    tl.store(block_ids + plane + position, tl.max(is_broken.to(tl.int32), axis=1), mask=row_mask)
    tl.debug_barrier()
    if tl.atomic_add(counters + pm, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.store(counters + pm, 0)
        reduce_blocks(
            block_scores, block_ids, temperature, tokens, ok, row, row_mask, tl.num_programs(1), plane, V, HAS_RANDOM,
            ROWS, WINDOW,
        )  # fmt: skip


@triton.jit
def reduce_blocks(
    block_scores, block_ids, temperature, tokens, ok, row, row_mask, blocks, plane, V: tl.constexpr,
    HAS_RANDOM: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Chooses among the best ids of all blocks: by score, or by noise and the gap below the row's highest score."""
    w = tl.arange(0, WINDOW)[None, :]
    top = tl.full((ROWS,), NEG_INF, tl.float32)
    if HAS_RANDOM:
        row_temperature = tl.load(temperature + row, mask=row_mask, other=0.0)[:, None]
        for first in range(0, blocks, WINDOW):
            mask = row_mask[:, None] & (first + w < blocks)
            pointers = block_scores + 2 * plane + row[:, None] * blocks + first + w
            top = tl.maximum(top, tl.max(tl.load(pointers, mask=mask, other=NEG_INF, cache_modifier=".cg"), axis=1))
    best = tl.full((ROWS,), NEG_INF, tl.float32)
    token = tl.full((ROWS,), V, tl.int32)
    is_broken = tl.zeros((ROWS,), tl.int32)
    for first in range(0, blocks, WINDOW):
        mask = row_mask[:, None] & (first + w < blocks)
        position = row[:, None] * blocks + first + w
        key = tl.load(block_scores + position, mask=mask, other=NEG_INF, cache_modifier=".cg")
        if HAS_RANDOM:
            noise = tl.load(block_scores + plane + position, mask=mask, other=NEG_INF, cache_modifier=".cg")
            key = tl.where(row_temperature > 0.0, noise - scaled_gaps(top[:, None], key, row_temperature), key)
        ids = tl.load(block_ids + position, mask=mask, other=V, cache_modifier=".cg")
        value, lowest = argmax_lowest_id(key, ids, mask, V)
        # Blocks come in the order of their ids, so of equal keys a later one has the higher id.
        is_better = (value > best) | (token == V)
        best, token = tl.where(is_better, value, best), tl.where(is_better, lowest, token)
        flags = tl.load(block_ids + plane + position, mask=mask, other=0, cache_modifier=".cg")
        is_broken = tl.maximum(is_broken, tl.max(flags, axis=1))
    tl.store(tokens + row, token, mask=row_mask)
    tl.store(ok + row, ((is_broken == 0) & (best > NEG_INF)).to(tl.int32), mask=row_mask)


@triton.jit
def logits_stats_kernel(
    scores, logits, invalid_ids, stats, VOCAB: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Statistics of whole rows that the other kernels need first; grid (rows, blocks of ids).

    For each block: the highest score, the highest logit (also of invalid ids), and whether some logit is NaN or +inf.
    HAS_LOGITS: the logits differ from the scores.
    """
    V: tl.constexpr = VOCAB.width
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    valid = is_valid_id(ids, invalid_ids, VOCAB)
    score = tl.load(scores + row * V + ids, mask=ids < V, other=NEG_INF)
    logit = tl.load(logits + row * V + ids, mask=ids < V, other=NEG_INF) if HAS_LOGITS else score
    target = stats + row * tl.num_programs(1) + block
    plane = tl.num_programs(0) * tl.num_programs(1)
    tl.store(target, tl.max(tl.where(valid, clamp_finite(score), NEG_INF), axis=0))
    tl.store(target + plane, tl.max(clamp_finite(logit), axis=0))
    tl.store(target + 2 * plane, tl.max((valid & ((logit != logit) | (logit == float("inf")))).to(tl.float32), axis=0))


@triton.jit
def row_stat(stats, row, blocks, PADDED_BLOCKS: tl.constexpr):
    """The maximum over a row's blocks of one of the statistics."""
    b = tl.arange(0, PADDED_BLOCKS)
    return tl.max(tl.load(stats + row * blocks + b, mask=b < blocks, other=NEG_INF), axis=0)


@triton.jit
def row_mass(masses, row, blocks, BLOCKS_PER_SUM: tl.constexpr):
    """Counts or probabilities of a row by eight bits of the rank ``[256]``, added in a fixed order of its blocks."""
    b, d = tl.arange(0, BLOCKS_PER_SUM), tl.arange(0, 256)
    sums = tl.zeros((BLOCKS_PER_SUM, 256), tl.float32)
    for first in range(0, blocks, BLOCKS_PER_SUM):
        mask = (first + b < blocks)[:, None]
        pointers = masses + (row * blocks + first + b)[:, None] * 512 + d[None, :]
        units = tl.load(pointers, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
        fractions = tl.load(pointers + 256, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
        sums += units * 9.5367431640625e-07 + fractions * 9.094947017729282e-13
    return tl.sum(sums, axis=0)


@triton.jit
def find_cutoff(mass, target):
    """The highest digit whose mass and that of all higher ones reach ``target``, and what its own mass must reach."""
    d = tl.arange(0, 256)
    is_enough = (tl.cumsum(mass, axis=0, reverse=True) >= target) & (mass > 0.0)
    digit = tl.max(tl.where(is_enough, d, -1), axis=0)
    # If rounding leaves too little, all of it is kept. (A row of -inf has no mass at all.)
    digit = tl.where(digit < 0, tl.min(tl.where(mass > 0.0, d, 255), axis=0), digit)
    return digit, target - tl.sum(tl.where(d > digit, mass, 0.0), axis=0)


@triton.jit
def radix_select_kernel(
    scores, invalid_ids, stats, temperature, top_k, top_p, min_p, first_threshold, prefix_in, remaining_in,
    counters_in, prefix, remaining, masses, counters,
    VOCAB: tl.constexpr, IS_SECOND: tl.constexpr, LEVEL: tl.constexpr, BLOCK_V: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr, BLOCKS_PER_SUM: tl.constexpr,
):  # fmt: skip
    """Eight more bits of the rank of the lowest score that is kept; grid (rows, blocks of ids).

    A row's first search is for top_k, or for top_p if it has no top_k; its second one is for top_p after top_k, among
    the ranks from ``first_threshold`` on. A search looks for the highest rank from which on the scores number k, or
    have p of the remaining probability. Of the scores whose upper bits are ``prefix_in`` each program adds up counts or
    probabilities by the next eight bits, and the program that finishes the row last selects these bits. ``remaining``
    is the count or probability that the scores with the new prefix must contribute.

    A block adds integers, in units of 2^-20 and the rest in units of 2^-40, which no order of additions can change.
    """
    V: tl.constexpr = VOCAB.width
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(1)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    is_counting = k > 0
    is_searching = is_counting | (p < 1.0)
    if IS_SECOND:
        is_searching = is_counting & (p < 1.0)
        is_counting = k < 0
    if is_searching:
        own_masses = masses + (row * blocks + block) * 512
        tl.store(own_masses + tl.arange(0, 512), 0)
        tl.debug_barrier()
        row_temperature = tl.load(temperature + row)
        top = row_stat(stats, row, blocks, PADDED_BLOCKS)
        row_prefix = tl.load(prefix_in + row)
        ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
        score = tl.load(scores + row * V + ids, mask=ids < V, other=NEG_INF)
        score = tl.where(is_valid_id(ids, invalid_ids, VOCAB), clamp_finite(score), NEG_INF)
        rank = score_to_rank(score)
        is_counted = ids < V
        if LEVEL > 0:
            is_counted &= (rank >> (32 - 8 * LEVEL)) == row_prefix
        if IS_SECOND:
            is_counted &= rank >= tl.load(first_threshold + row)
        gap = scaled_gaps(top, score, row_temperature)
        weight = tl.where(gap <= -tl.log(tl.load(min_p + row)), tl.exp(-gap), 0.0)
        weight = tl.where(is_counting, 1.0, weight) * 1048576.0
        units = weight.to(tl.int32)
        fractions = ((weight - units.to(tl.float32)) * 1048576.0).to(tl.int32)
        digit = own_masses + ((rank >> (24 - 8 * LEVEL)) & 255).to(tl.int32)
        tl.atomic_add(digit, units, mask=is_counted & (units > 0), sem="relaxed", scope="gpu")
        tl.atomic_add(digit + 256, fractions, mask=is_counted & (fractions > 0), sem="relaxed", scope="gpu")
        tl.debug_barrier()
        if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == blocks - 1:
            tl.store(counters + row, 0)
            mass = row_mass(masses, row, blocks, BLOCKS_PER_SUM)
            if LEVEL > 0:
                target = tl.load(remaining_in + row)
            else:
                target = tl.where(is_counting, tl.minimum(k, V).to(tl.float32), p * tl.sum(mass, axis=0))
            new_digit, new_remaining = find_cutoff(mass, target)
            tl.store(prefix + row, (row_prefix << 8) | new_digit.to(tl.uint32))
            tl.store(remaining + row, new_remaining)
    elif block == 0:
        tl.store(prefix + row, 0)


@triton.jit
def reduce_splits(
    block_keys, block_ids, row, blocks, plane, V: tl.constexpr, RETURN_LOGPROB: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The lowest id with the highest key of all blocks, that key, and the sum of all exponentials."""
    b = tl.arange(0, PADDED_BLOCKS)
    position = row * blocks + b
    keys = tl.load(block_keys + position, mask=b < blocks, other=NEG_INF, cache_modifier=".cg")
    ids = tl.load(block_ids + position, mask=b < blocks, other=V, cache_modifier=".cg")
    best = tl.max(keys, axis=0)
    total = 1.0
    if RETURN_LOGPROB:
        total = tl.sum(tl.load(block_keys + plane + position, mask=b < blocks, other=0.0, cache_modifier=".cg"), axis=0)
    return tl.min(tl.where(keys == best, ids, V), axis=0), best, total


@triton.jit
def sample_kernel(
    scores, logits, invalid_ids, stats, temperature, top_k, top_p, min_p, seeds, positions, first_threshold,
    second_threshold, counters_in, tokens, ok, logprob, block_keys, block_ids, counters,
    VOCAB: tl.constexpr, HAS_RANDOM: tl.constexpr, HAS_FILTERS: tl.constexpr, RETURN_LOGPROB: tl.constexpr,
    BLOCK_V: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Tokens of the scores that the thresholds keep; grid (rows, blocks of ids).

    The program that finishes a row last chooses the best of all blocks.
    """
    V: tl.constexpr = VOCAB.width
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(1)
    plane = tl.num_programs(0) * blocks
    row_temperature = tl.load(temperature + row)
    top = row_stat(stats, row, blocks, PADDED_BLOCKS)
    top_logit = row_stat(stats + plane, row, blocks, PADDED_BLOCKS)
    if HAS_RANDOM:
        high, low, position = tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1), tl.load(positions + row)
    if HAS_FILTERS:
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        first, second = tl.load(first_threshold + row), tl.load(second_threshold + row)
        min_rank = tl.where(k > 0, first, 0)
        top_p_rank = tl.where(p < 1.0, tl.where(k > 0, second, first), 0)
        max_gap = -tl.log(tl.load(min_p + row))
        if top_p_rank > 0:
            max_gap = tl.minimum(max_gap, scaled_gaps(top, rank_to_score(top_p_rank), row_temperature))
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    valid = is_valid_id(ids, invalid_ids, VOCAB)
    score = tl.load(scores + row * V + ids, mask=ids < V, other=NEG_INF)
    key = tl.where(valid, clamp_finite(score), NEG_INF)
    if HAS_RANDOM:
        gap = scaled_gaps(top, key, row_temperature)
        if HAS_FILTERS:
            gap = tl.where((gap <= max_gap) & (score_to_rank(key) >= min_rank), gap, float("inf"))
        key = tl.where(row_temperature > 0.0, gumbel_noise(high, low, position, ids) - gap, key)
    value = tl.max(tl.where(valid, key, NEG_INF), axis=0)
    target = row * blocks + block
    tl.store(block_keys + target, value)
    tl.store(block_ids + target, tl.min(tl.where(valid & (key == value), ids, V), axis=0))
    if RETURN_LOGPROB:
        logit = clamp_finite(tl.load(logits + row * V + ids, mask=ids < V, other=NEG_INF))
        tl.store(block_keys + plane + target, tl.sum(tl.exp(-gap_below_top(top_logit, logit)), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == blocks - 1:
        tl.store(counters + row, 0)
        token, best_key, total = reduce_splits(
            block_keys, block_ids, row, blocks, plane, V, RETURN_LOGPROB, PADDED_BLOCKS
        )
        is_broken = row_stat(stats + 2 * plane, row, blocks, PADDED_BLOCKS)
        tl.store(tokens + row, token)
        tl.store(ok + row, ((is_broken == 0.0) & (best_key > NEG_INF)).to(tl.int32))
        if RETURN_LOGPROB:
            token_logit = clamp_finite(tl.load(logits + row * V + token, mask=token < V, other=NEG_INF))
            tl.store(logprob + row, -gap_below_top(top_logit, token_logit) - tl.log(tl.maximum(total, 1.0)))
