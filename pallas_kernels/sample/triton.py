"""One token for each row from its logits, without a sort.

Numbers that decide are compared, added in one order, or functions of (seed, position, id) alone; so a row's token
depends on nothing but the row. NaN counts as -inf and +inf as the largest float, as everywhere in the sampler.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import dot_tile, inv_rms, load_sum_sq

MAX_FLOAT: tl.constexpr = tl.constexpr(3.4028234663852886e38)
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def threefry_rounds(x, y, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    """Four rounds of Threefry-2x32, with these rotations."""
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
    """Standard Gumbel noise of (seed, position after this, id), as ``glm_jax.sampling.gumbel`` makes it."""
    last = high ^ low ^ 0x1BD11BDA
    x, y = (position + 1).to(tl.uint32) + high, ids.to(tl.uint32) + low
    x, y = threefry_rounds(x, y, 13, 15, 26, 6)
    x, y = threefry_rounds(x + low, y + last + 1, 17, 29, 16, 24)
    x, y = threefry_rounds(x + last, y + high + 2, 13, 15, 26, 6)
    x, y = threefry_rounds(x + high, y + low + 3, 17, 29, 16, 24)
    x, y = threefry_rounds(x + low, y + last + 4, 13, 15, 26, 6)
    bits = x + last
    uniform = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    uniform = tl.minimum(uniform, 0.999999940395355225)
    # -log1p(-uniform): what the subtraction rounds away is put back by the quotient.
    rest = 1.0 - uniform
    spread = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / (1.0 - rest)))
    return -tl.log(spread)


@triton.jit
def clamp_finite(x):
    """NaN as -inf, +inf as the largest float, and one zero."""
    x = tl.where(x != x, NEG_INF, tl.minimum(x, MAX_FLOAT))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def is_valid_id(ids, missing, VALID: tl.constexpr, MISSING: tl.constexpr):
    """Which ids the tokenizer has."""
    there = ids < VALID
    if MISSING:
        there &= tl.load(missing + ids, mask=there, other=1) == 0
    return there


@triton.jit
def gap_below_top(top, score):
    """How far scores lie below the highest."""
    return tl.where(top > NEG_INF, top, 0.0) - score


@triton.jit
def scaled_gaps(top, score, temperature):
    """The same in units of the temperature, of which 0 counts as 1."""
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
def argmax_lowest_id(keys, ids, among, NOBODY: tl.constexpr):
    """The highest key of each row, and the lowest id that has it; -inf and NOBODY where there are none."""
    best = tl.max(tl.where(among, keys, NEG_INF), axis=1)
    return best, tl.min(tl.where(among & (keys == best[:, None]), ids, NOBODY), axis=1)


@triton.jit
def lm_head_sample_kernel(
    x, squares, words, scales, offsets, missing, temperature, seeds, positions, counters_in,
    tokens, ok, numbers, found, counters,
    M: tl.constexpr, V: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, PER_WORD: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr, VALID: tl.constexpr, MISSING: tl.constexpr,
    DRAWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, W: tl.constexpr, FACTOR: tl.constexpr,
    FIRST: tl.constexpr, PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, EPS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Tokens of the logits ``factor(x) * (x @ w.T)``; programs (block of rows, block of ids).

    A program leaves the best of its ids, by keys that take its own highest score for the row's, and the one that
    finishes a block of rows last chooses among these, in windows of W.
    """
    pm, pn = tl.program_id(0), tl.program_id(1)
    rows = pm * BM + tl.arange(0, BM)
    HALVES: tl.constexpr = 64 // BN  # written so that the compiler sees how places in a tile are aligned
    if FACTOR:
        parts = load_sum_sq(squares, rows, rows < M, FIRST, PARTS, ALL_PARTS)
    acc = dot_tile(
        tl.zeros((BM, BN), tl.float32), x, rows, rows < M, x, words, scales, offsets, pn.to(tl.int64) // HALVES,
        (pn % HALVES) * BN, 0, CHUNKS, K, STRIDE, CHUNKS, GROUPS, GROUP, SUB, PER_WORD, KIND, BM, BN, False, SCALED,
        OFFSET, DT,
    )  # fmt: skip
    if FACTOR:
        acc = acc * inv_rms(parts, EPS, K)[:, None]
    if R < BM:  # one row: the rest of the block is nothing to draw from
        acc = tl.sum(tl.where((rows == 0)[:, None], acc, 0.0), axis=0)[None, :]
    row = pm * BM + tl.arange(0, R)
    here = row < M
    ids = (pn * BN + tl.arange(0, BN))[None, :] + 0 * row[:, None]
    there = is_valid_id(ids, missing, VALID, MISSING)
    score = tl.where(there, clamp_finite(acc), NEG_INF)
    top = tl.max(score, axis=1)
    key = score
    if DRAWN:
        warmth = tl.load(temperature + row, mask=here, other=0.0)[:, None]
        high = tl.load(seeds + 2 * row, mask=here, other=0)[:, None]
        low = tl.load(seeds + 2 * row + 1, mask=here, other=0)[:, None]
        noise = gumbel_noise(high, low, tl.load(positions + row, mask=here, other=0)[:, None], ids)
        # An approximate quotient: an exact one is a subroutine, and the order is only that of the block.
        gap = gap_below_top(top[:, None], score) / tl.where(warmth > 0.0, warmth, 1.0)
        key = tl.where(warmth > 0.0, noise - gap, score)
    _, best = argmax_lowest_id(key, ids, there, V)
    mine = ids == best[:, None]
    at = row * tl.num_programs(1) + pn
    plane = M * tl.num_programs(1)
    tl.store(numbers + at, tl.max(tl.where(mine, score, NEG_INF), axis=1), mask=here)
    if DRAWN:
        tl.store(numbers + plane + at, tl.max(tl.where(mine, noise, NEG_INF), axis=1), mask=here)
        tl.store(numbers + 2 * plane + at, top, mask=here)
    broken = there & ((acc != acc) | (acc == float("inf")))
    tl.store(found + at, best, mask=here)
    tl.store(found + plane + at, tl.max(broken.to(tl.int32), axis=1), mask=here)
    tl.debug_barrier()
    if tl.atomic_add(counters + pm, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.store(counters + pm, 0)
        reduce_blocks(numbers, found, temperature, tokens, ok, row, here, tl.num_programs(1), plane, V, DRAWN, R, W)


@triton.jit
def reduce_blocks(
    numbers, found, temperature, tokens, ok, row, here, blocks, plane, V: tl.constexpr, DRAWN: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The best of what the blocks found: by the scores, or by noise and the gaps below the row's highest score."""
    w = tl.arange(0, W)[None, :]
    top = tl.full((R,), NEG_INF, tl.float32)
    if DRAWN:
        warmth = tl.load(temperature + row, mask=here, other=0.0)[:, None]
        for first in range(0, blocks, W):
            inside = here[:, None] & (first + w < blocks)
            at = numbers + 2 * plane + row[:, None] * blocks + first + w
            top = tl.maximum(top, tl.max(tl.load(at, mask=inside, other=NEG_INF, cache_modifier=".cg"), axis=1))
    best = tl.full((R,), NEG_INF, tl.float32)
    token = tl.full((R,), V, tl.int32)
    broken = tl.zeros((R,), tl.int32)
    for first in range(0, blocks, W):
        inside = here[:, None] & (first + w < blocks)
        at = row[:, None] * blocks + first + w
        key = tl.load(numbers + at, mask=inside, other=NEG_INF, cache_modifier=".cg")
        if DRAWN:
            noise = tl.load(numbers + plane + at, mask=inside, other=NEG_INF, cache_modifier=".cg")
            key = tl.where(warmth > 0.0, noise - scaled_gaps(top[:, None], key, warmth), key)
        ids = tl.load(found + at, mask=inside, other=V, cache_modifier=".cg")
        value, lowest = argmax_lowest_id(key, ids, inside, V)
        # Blocks come in the order of their ids, so that an equal that comes later has a higher one.
        better = (value > best) | (token == V)
        best, token = tl.where(better, value, best), tl.where(better, lowest, token)
        flags = tl.load(found + plane + at, mask=inside, other=0, cache_modifier=".cg")
        broken = tl.maximum(broken, tl.max(flags, axis=1))
    tl.store(tokens + row, token, mask=here)
    tl.store(ok + row, ((broken == 0) & (best > NEG_INF)).to(tl.int32), mask=here)


@triton.jit
def logits_stats_kernel(
    scores, logits, missing, summary,
    V: tl.constexpr, VALID: tl.constexpr, MISSING: tl.constexpr, RAW: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """What must be known of a whole row before anything else; programs (row, share of the ids).

    For each share: the highest score, the highest logit (of ids that cannot be drawn, too), and whether some logit is
    NaN or +inf. RAW: the logits are other numbers than the scores.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    ids = part * SHARE + tl.arange(0, SHARE)
    there = is_valid_id(ids, missing, VALID, MISSING)
    score = tl.load(scores + row * V + ids, mask=ids < V, other=NEG_INF)
    raw = tl.load(logits + row * V + ids, mask=ids < V, other=NEG_INF) if RAW else score
    at = summary + row * tl.num_programs(1) + part
    plane = tl.num_programs(0) * tl.num_programs(1)
    tl.store(at, tl.max(tl.where(there, clamp_finite(score), NEG_INF), axis=0))
    tl.store(at + plane, tl.max(clamp_finite(raw), axis=0))
    tl.store(at + 2 * plane, tl.max((there & ((raw != raw) | (raw == float("inf")))).to(tl.float32), axis=0))


@triton.jit
def row_max(summary, row, shares, WIDE: tl.constexpr):
    """The highest of what a survey left of a row."""
    s = tl.arange(0, WIDE)
    return tl.max(tl.load(summary + row * shares + s, mask=s < shares, other=NEG_INF), axis=0)


@triton.jit
def row_mass(masses, row, shares, RUN: tl.constexpr):
    """What counts of a row, by eight bits of the rank: the sums of its shares ``[256]``, always in the same order."""
    s, d = tl.arange(0, RUN), tl.arange(0, 256)
    sums = tl.zeros((RUN, 256), tl.float32)
    for first in range(0, shares, RUN):
        inside = (first + s < shares)[:, None]
        at = masses + (row * shares + first + s)[:, None] * 512 + d[None, :]
        units = tl.load(at, mask=inside, other=0, cache_modifier=".cg").to(tl.float32)
        parts = tl.load(at + 256, mask=inside, other=0, cache_modifier=".cg").to(tl.float32)
        sums += units * 9.5367431640625e-07 + parts * 9.094947017729282e-13
    return tl.sum(sums, axis=0)


@triton.jit
def find_cutoff(mass, wanted):
    """The highest place from which on there is enough, and what is wanted of that place itself."""
    d = tl.arange(0, 256)
    enough = (tl.cumsum(mass, axis=0, reverse=True) >= wanted) & (mass > 0.0)
    place = tl.max(tl.where(enough, d, -1), axis=0)
    # Rounding may leave too little: then all of it is wanted. (Nothing at all is a row of -inf.)
    place = tl.where(place < 0, tl.min(tl.where(mass > 0.0, d, 255), axis=0), place)
    return place, wanted - tl.sum(tl.where(d > place, mass, 0.0), axis=0)


@triton.jit
def radix_select_kernel(
    scores, missing, summary, temperature, top_k, top_p, min_p, before, edge_in, left_in, counters_in,
    edge, left, masses, counters,
    V: tl.constexpr, VALID: tl.constexpr, MISSING: tl.constexpr, SECOND: tl.constexpr, LEVEL: tl.constexpr,
    SHARE: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Eight more bits of the lowest score that is kept; programs (row, share of the ids).

    A row's first search is for top_k, where it has one, and else for top_p; its second one for top_p after top_k, from
    ``before`` on. A search wants the highest rank from which on scores count k, or weigh p of all that is left. Of
    those whose upper bits are ``edge_in`` a program adds up what counts, by the next eight bits; and the one that
    finishes the row last finds the eight in question. ``left`` is what is still wanted of them.

    A share is added up in integers, units of 2^-20 and what remains in units of 2^-40: no order can change that.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    shares = tl.num_programs(1)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    counting = k > 0
    searching = counting | (p < 1.0)
    if SECOND:
        searching = counting & (p < 1.0)
        counting = k < 0
    if searching:
        mine = masses + (row * shares + part) * 512
        tl.store(mine + tl.arange(0, 512), 0)
        tl.debug_barrier()
        warmth = tl.load(temperature + row)
        top = row_max(summary, row, shares, WIDE)
        prefix = tl.load(edge_in + row)
        ids = part * SHARE + tl.arange(0, SHARE)
        score = tl.load(scores + row * V + ids, mask=ids < V, other=NEG_INF)
        score = tl.where(is_valid_id(ids, missing, VALID, MISSING), clamp_finite(score), NEG_INF)
        rank = score_to_rank(score)
        counts = ids < V
        if LEVEL > 0:
            counts &= (rank >> (32 - 8 * LEVEL)) == prefix
        if SECOND:
            counts &= rank >= tl.load(before + row)
        gap = scaled_gaps(top, score, warmth)
        weight = tl.where(gap <= -tl.log(tl.load(min_p + row)), tl.exp(-gap), 0.0)
        weight = tl.where(counting, 1.0, weight) * 1048576.0
        units = weight.to(tl.int32)
        parts = ((weight - units.to(tl.float32)) * 1048576.0).to(tl.int32)
        place = mine + ((rank >> (24 - 8 * LEVEL)) & 255).to(tl.int32)
        tl.atomic_add(place, units, mask=counts & (units > 0), sem="relaxed", scope="gpu")
        tl.atomic_add(place + 256, parts, mask=counts & (parts > 0), sem="relaxed", scope="gpu")
        tl.debug_barrier()
        if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == shares - 1:
            tl.store(counters + row, 0)
            mass = row_mass(masses, row, shares, RUN)
            if LEVEL > 0:
                wanted = tl.load(left_in + row)
            else:
                wanted = tl.where(counting, tl.minimum(k, V).to(tl.float32), p * tl.sum(mass, axis=0))
            eight, rest = find_cutoff(mass, wanted)
            tl.store(edge + row, (prefix << 8) | eight.to(tl.uint32))
            tl.store(left + row, rest)
    elif part == 0:
        tl.store(edge + row, 0)


@triton.jit
def reduce_splits(
    numbers, found, row, shares, plane, V: tl.constexpr, LOGPROB: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The lowest id with the highest key among those of the shares; that key; the sum of all weights."""
    s = tl.arange(0, WIDE)
    at = row * shares + s
    keys = tl.load(numbers + at, mask=s < shares, other=NEG_INF, cache_modifier=".cg")
    ids = tl.load(found + at, mask=s < shares, other=V, cache_modifier=".cg")
    best = tl.max(keys, axis=0)
    total = 1.0
    if LOGPROB:
        total = tl.sum(tl.load(numbers + plane + at, mask=s < shares, other=0.0, cache_modifier=".cg"), axis=0)
    return tl.min(tl.where(keys == best, ids, V), axis=0), best, total


@triton.jit
def sample_kernel(
    scores, logits, missing, summary, temperature, top_k, top_p, min_p, seeds, positions, first_edge, second_edge,
    counters_in, tokens, ok, logprob, numbers, found, counters,
    V: tl.constexpr, VALID: tl.constexpr, MISSING: tl.constexpr, DRAWN: tl.constexpr, FILTERS: tl.constexpr,
    LOGPROB: tl.constexpr, SHARE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tokens, from what the searches left; programs (row, share of the ids).

    The program that finishes a row last chooses the best of the shares'.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    shares = tl.num_programs(1)
    plane = tl.num_programs(0) * shares
    warmth = tl.load(temperature + row)
    top = row_max(summary, row, shares, WIDE)
    highest_logit = row_max(summary + plane, row, shares, WIDE)
    if DRAWN:
        high, low, position = tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1), tl.load(positions + row)
    if FILTERS:
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        one, two = tl.load(first_edge + row), tl.load(second_edge + row)
        least = tl.where(k > 0, one, 0)
        edge = tl.where(p < 1.0, tl.where(k > 0, two, one), 0)
        widest = -tl.log(tl.load(min_p + row))
        if edge > 0:
            widest = tl.minimum(widest, scaled_gaps(top, rank_to_score(edge), warmth))
    ids = part * SHARE + tl.arange(0, SHARE)
    there = is_valid_id(ids, missing, VALID, MISSING)
    score = tl.load(scores + row * V + ids, mask=ids < V, other=NEG_INF)
    key = tl.where(there, clamp_finite(score), NEG_INF)
    if DRAWN:
        gap = scaled_gaps(top, key, warmth)
        if FILTERS:
            gap = tl.where((gap <= widest) & (score_to_rank(key) >= least), gap, float("inf"))
        key = tl.where(warmth > 0.0, gumbel_noise(high, low, position, ids) - gap, key)
    value = tl.max(tl.where(there, key, NEG_INF), axis=0)
    at = row * shares + part
    tl.store(numbers + at, value)
    tl.store(found + at, tl.min(tl.where(there & (key == value), ids, V), axis=0))
    if LOGPROB:
        raw = clamp_finite(tl.load(logits + row * V + ids, mask=ids < V, other=NEG_INF))
        tl.store(numbers + plane + at, tl.sum(tl.exp(-gap_below_top(highest_logit, raw)), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == shares - 1:
        tl.store(counters + row, 0)
        chosen, highest_key, all_ = reduce_splits(numbers, found, row, shares, plane, V, LOGPROB, WIDE)
        broken = row_max(summary + 2 * plane, row, shares, WIDE)
        tl.store(tokens + row, chosen)
        tl.store(ok + row, ((broken == 0.0) & (highest_key > NEG_INF)).to(tl.int32))
        if LOGPROB:
            logit = clamp_finite(tl.load(logits + row * V + chosen, mask=chosen < V, other=NEG_INF))
            tl.store(logprob + row, -gap_below_top(highest_logit, logit) - tl.log(tl.maximum(all_, 1.0)))
