"""Attention over the latent cache, in three kernels: queries and the new cache row, attention, values."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import dot_accumulate, dot_tile, inv_rms, load_sum_sq


@triton.jit
def load_rotated(pointer, mask, cos, sin, P: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Both halves of the rotated pairs ``[BM, P / 2]`` of rows of P values at ``pointer``, ``[BM, 1]``."""
    j = tl.arange(0, P // 2)[None, :]
    one, other = (2 * j, 2 * j + 1) if INTERLEAVE else (j, j + P // 2)
    a = tl.load(pointer + one, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(pointer + other, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def round_half_even(x):
    """Nearest whole numbers, halves to even, of float32 below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def abs_or_inf(x):
    """Magnitudes; infinite for a NaN, which a GPU's maximum would pass over."""
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def quant_scale(top, LARGEST: tl.constexpr):
    """Scale of values up to ``top``; see ``glm_jax.cache``. An infinite one makes NaN of all its values."""
    scale = tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32))
    return tl.where(scale < 1.1754943508222875e-38, 0.0, scale)


@triton.jit
def quantize_rows(x, scale, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """8-bit codes of rows ``[BM, n]`` with scales ``[BM]``."""
    units = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(x))
    units = tl.where(units == units, units, 0.0)
    units = tl.minimum(tl.maximum(units, -LARGEST), LARGEST)
    if FP8:
        # float8 e4m3 by hand, the same on every card: three bits of mantissa, ties to even; units of 2^-9 below 2^-6.
        small = tl.abs(units)
        bits = small.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        code = tl.where(small < 0.015625, round_half_even(small * 512.0).to(tl.uint32), normal)
        codes = (code | ((units < 0.0).to(tl.uint32) << 7)).to(tl.uint8)
    else:
        codes = round_half_even(units).to(tl.int8)
    return codes


@triton.jit
def cache_row_index(
    pages, layer, batch, slot, here, BATCH: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr, POOL: tl.constexpr
):  # fmt: skip
    """The row of the cache that holds a slot of a row of the batch; ``layer`` is a 64-bit integer."""
    if PAGE:
        page = tl.load(pages + batch * (SLOTS // PAGE) + slot // PAGE, mask=here, other=0)
        return layer * POOL + page.to(tl.int64) * PAGE + slot % PAGE
    return (layer * BATCH + batch) * SLOTS + slot


@triton.jit
def write_cache_rows(
    a, squares, positions, cos, sin, pages, cache, cache_scales, queries, layer, rows, here, T: tl.constexpr,
    P: tl.constexpr, RQ: tl.constexpr, R: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr,
    POOL: tl.constexpr, EPS: tl.constexpr, ALL_PARTS: tl.constexpr, K_FIRST: tl.constexpr, K_PARTS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """Writes the normed latents and rotated rope keys of new tokens into a layer of the cache."""
    WIDTH: tl.constexpr = RQ + R + P
    j = tl.arange(0, P // 2)
    position = tl.load(positions + rows, mask=here, other=0)
    stored = here & (position >= 0) & (position < SLOTS)
    inside = stored[:, None]
    row = cache_row_index(pages, layer, rows // T, position, stored, BATCH, SLOTS, PAGE, POOL)
    r = tl.arange(0, R)[None, :]
    latent = tl.load(a + rows[:, None] * WIDTH + RQ + r, mask=here[:, None], other=0.0).to(tl.float32)
    latent = latent * inv_rms(load_sum_sq(squares, rows, here, K_FIRST, K_PARTS, ALL_PARTS), EPS, R)[:, None]
    # A row has the dtype of the activations before it is stored in 8 bits.
    latent = latent.to(queries.dtype.element_ty).to(tl.float32)
    first, second = load_rotated(a + rows[:, None] * WIDTH + RQ + R, here[:, None], cos, sin, P, INTERLEAVE)
    first = first.to(queries.dtype.element_ty).to(tl.float32)
    second = second.to(queries.dtype.element_ty).to(tl.float32)
    one, other = (2 * j, 2 * j + 1) if INTERLEAVE else (j, j + P // 2)
    out = cache + row[:, None] * (R + P)
    if CACHE == "int8" or CACHE == "fp8":
        largest: tl.constexpr = 127.0 if CACHE == "int8" else 448.0
        scale = quant_scale(tl.max(abs_or_inf(latent), axis=1), largest)
        key_scale = quant_scale(tl.max(tl.maximum(abs_or_inf(first), abs_or_inf(second)), axis=1), largest)
        latent = quantize_rows(latent, scale, largest, CACHE == "fp8")
        first = quantize_rows(first, key_scale, largest, CACHE == "fp8")
        second = quantize_rows(second, key_scale, largest, CACHE == "fp8")
        tl.store(cache_scales + row * 2, scale, mask=stored)
        tl.store(cache_scales + row * 2 + 1, key_scale, mask=stored)
    tl.store(out + r, latent.to(cache.dtype.element_ty), mask=inside)
    tl.store(out + R + one[None, :], first.to(cache.dtype.element_ty), mask=inside)
    tl.store(out + R + other[None, :], second.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def absorbed_q_proj_kernel(
    a, squares, place, positions, table, pages, q_words, q_scales, q_offsets, k_words, k_inputs,
    cache_in, cache_scales_in, queries, scratch, cache, cache_scales,
    M: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, P: tl.constexpr, RQ: tl.constexpr,
    R: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr, POOL: tl.constexpr,
    LATENT_TILES: tl.constexpr, PER: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr, ALL_PARTS: tl.constexpr,
    Q_PARTS: tl.constexpr, K_FIRST: tl.constexpr,
    K_PARTS: tl.constexpr, INTERLEAVE: tl.constexpr, CACHE: tl.constexpr, CACHE_FROM: tl.constexpr,
    DT: tl.constexpr, Q_TILES: tl.constexpr, Q_CHUNKS: tl.constexpr, Q_GROUPS: tl.constexpr,
    Q_GROUP: tl.constexpr, Q_SUB: tl.constexpr, Q_PER_WORD: tl.constexpr, Q_KIND: tl.constexpr,
    Q_SCALED: tl.constexpr, Q_OFFSET: tl.constexpr, K_CHUNKS: tl.constexpr, K_PER_WORD: tl.constexpr,
    K_KIND: tl.constexpr, K_INPUT_TILES: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr,
):  # fmt: skip
    """Queries in the space of the latents, and the rows of the new tokens in the cache.

    Programs (head and share of the latents, block of rows): each computes its head's query again, so that there are
    enough of them and none waits for another. It does so QN outputs at a time, and then KN: a loop that begins anew
    waits for memory anew. The last one along the first axis writes the cache. ``place`` has the
    index of the layer in the weights; CACHE_FROM more is that in the cache.
    """
    who, pm = tl.program_id(0), tl.program_id(1)
    rows = pm * BM + tl.arange(0, BM)
    here = rows < M
    WIDTH: tl.constexpr = RQ + R + P
    j = tl.arange(0, P // 2)
    turn = rows[:, None] * (P // 2) + j[None, :]
    cos = tl.load(table + turn, mask=here[:, None], other=0.0).to(tl.float32)
    sin = tl.load(table + M * (P // 2) + turn, mask=here[:, None], other=0.0).to(tl.float32)
    layer = tl.load(place).to(tl.int64)
    SHARES: tl.constexpr = LATENT_TILES // PER
    if who < HEADS * SHARES:
        head, share = who // SHARES, who % SHARES
        H: tl.constexpr = NOPE + P
        mine = scratch + (who.to(tl.int64) * M + rows[:, None]) * H
        parts = load_sum_sq(squares, rows, here, 0, Q_PARTS, ALL_PARTS)
        n = tl.arange(0, QN)
        for t in range(H // QN):
            tile = layer * Q_TILES + head * (H // 64) + t * (QN // 64)
            q = dot_tile(
                tl.zeros((BM, QN), tl.float32), a, rows, here, a, q_words, q_scales, q_offsets, tile, 0, 0, Q_CHUNKS,
                RQ, WIDTH, Q_CHUNKS, Q_GROUPS, Q_GROUP, Q_SUB, Q_PER_WORD, Q_KIND, BM, QN, False, Q_SCALED,
                Q_OFFSET, DT,
            )  # fmt: skip
            q = q * inv_rms(parts, EPS, RQ)[:, None]
            tl.store(mine + t * QN + n[None, :], q.to(scratch.dtype.element_ty), mask=here[:, None])
        tl.debug_barrier()
        to = queries + (rows[:, None].to(tl.int64) * HEADS + head) * (R + P)
        if share == 0:
            first, second = load_rotated(mine + NOPE, here[:, None], cos, sin, P, INTERLEAVE)
            one, other = (2 * j, 2 * j + 1) if INTERLEAVE else (j, j + P // 2)
            tl.store(to + R + one[None, :], first.to(queries.dtype.element_ty), mask=here[:, None])
            tl.store(to + R + other[None, :], second.to(queries.dtype.element_ty), mask=here[:, None])
        own = scratch + who.to(tl.int64) * M * H
        n = tl.arange(0, KN)
        for t in range(PER * 64 // KN):
            column = share * PER + t * (KN // 64)
            tile = (layer * HEADS + head) * LATENT_TILES + column
            group = (layer * HEADS + head) * K_INPUT_TILES + column * K_INPUT_TILES // LATENT_TILES
            factors = k_inputs + group * NOPE
            absorbed = dot_tile(
                tl.zeros((BM, KN), tl.float32), own, rows, here, factors, k_words, k_words, k_words, tile, 0, 0,
                K_CHUNKS, NOPE, H, K_CHUNKS, 1, 0, K_PER_WORD * 16, K_PER_WORD, K_KIND, BM, KN, K_INPUT_TILES > 0,
                False, False, DT,
            )  # fmt: skip
            inside = here[:, None] & (column * 64 + n < R)[None, :]
            tl.store(to + column * 64 + n[None, :], absorbed.to(queries.dtype.element_ty), mask=inside)
    else:
        write_cache_rows(
            a, squares, positions, cos, sin, pages, cache, cache_scales, queries, layer + CACHE_FROM, rows, here, T, P,
            RQ, R, BATCH, SLOTS, PAGE, POOL, EPS, ALL_PARTS, K_FIRST, K_PARTS, INTERLEAVE, CACHE,
        )  # fmt: skip


@triton.jit
def dequantize_cache(codes, CACHE: tl.constexpr, DT: tl.constexpr):
    """Codes of the cache in the dtype of the products."""
    if CACHE == "fp8":
        bits = codes.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DT)
    return codes.to(tl.float32).to(DT) if CACHE == "int8" else codes.to(DT)


@triton.jit
def split_bounds(
    positions, batch, T: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """How many cached rows the tokens of a row of the batch see, and how many of them are one share."""
    t = tl.arange(0, triton.next_power_of_2(T))
    newest = tl.max(tl.load(positions + batch * T + t, mask=t < T, other=0), axis=0)
    length = tl.maximum(tl.minimum(newest + 1, SLOTS), 0)
    return length, tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BS), 1) * BS


@triton.jit
def flash_decode_kernel(
    queries, cache, cache_scales, pages, place, positions, parts, tops, totals,
    T: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr,
    PAGE: tl.constexpr, POOL: tl.constexpr, SPLITS: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    SCALE: tl.constexpr, CACHE: tl.constexpr,
    CACHE_FROM: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Attention of all heads over a share of the cached rows; programs (share, block of queries, row of the batch).

    Rows are read once for scores and values. Each share leaves its largest score, the sum of exponentials and the
    unnormalized sum of latents behind; a share without rows leaves nothing.
    """
    split, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, share = split_bounds(positions, batch, T, SLOTS, SPLITS, BS)
    start, stop = split * share, tl.minimum(split * share + share, length)
    if start < stop:
        flash_decode_split(
            queries, cache, cache_scales, pages, place, positions, parts, tops, totals, split, block, batch, start,
            stop,
            T, HEADS, R, P, BATCH, SLOTS, PAGE, POOL, SPLITS, BQ, BS, SCALE, CACHE, CACHE_FROM, DT,
        )  # fmt: skip


@triton.jit
def flash_decode_split(
    queries, cache, cache_scales, pages, place, positions, parts, tops, totals, split, block, batch, start, stop,
    T: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr,
    PAGE: tl.constexpr, POOL: tl.constexpr, SPLITS: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    SCALE: tl.constexpr, CACHE: tl.constexpr,
    CACHE_FROM: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """One program of :func:`flash_decode_kernel`, over the cached rows from start to stop."""
    q = block * BQ + tl.arange(0, BQ)
    here = q < T * HEADS
    position = tl.load(positions + batch * T + q // HEADS, mask=here, other=-1)
    r, p, s = tl.arange(0, R), tl.arange(0, P), tl.arange(0, BS)
    mine = queries + (batch * T * HEADS + q[:, None]).to(tl.int64) * (R + P)
    latents = tl.load(mine + r[None, :], mask=here[:, None], other=0.0).to(DT)
    ropes = tl.load(mine + R + p[None, :], mask=here[:, None], other=0.0).to(DT)
    top = tl.full((BQ,), -1e30, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, R), tl.float32)
    layer = tl.load(place).to(tl.int64) + CACHE_FROM
    for at in range(start, stop, BS):
        slot = at + s
        seen = slot < stop
        # Blocks of rows begin at multiples of their size, which divides that of a page.
        rows = cache_row_index(pages, layer, batch, at, True, BATCH, SLOTS, PAGE, POOL) + s
        row = cache + rows[:, None] * (R + P)
        values = dequantize_cache(tl.load(row + r[None, :], mask=seen[:, None], other=0), CACHE, DT)
        keys = dequantize_cache(tl.load(row + R + p[None, :], mask=seen[:, None], other=0), CACHE, DT)
        scores = dot_accumulate(latents, tl.trans(values), tl.zeros((BQ, BS), tl.float32), DT)
        if CACHE == "int8" or CACHE == "fp8":
            of_latent = tl.load(cache_scales + rows * 2, mask=seen, other=0.0)
            of_key = tl.load(cache_scales + rows * 2 + 1, mask=seen, other=0.0)
            turned = dot_accumulate(ropes, tl.trans(keys), tl.zeros((BQ, BS), tl.float32), DT)
            scores = scores * of_latent[None, :] + turned * of_key[None, :]
        else:
            scores = dot_accumulate(ropes, tl.trans(keys), scores, DT)
        visible = seen[None, :] & (slot[None, :] <= position[:, None])
        scores = tl.where(visible, scores * SCALE, -1e30)
        highest = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp(scores - highest[:, None]), 0.0)
        rescale = tl.exp(top - highest)
        total = total * rescale + tl.sum(weights, axis=1)
        if CACHE == "int8" or CACHE == "fp8":
            weights = weights * of_latent[None, :]
        acc = dot_accumulate(weights.to(DT), values, acc * rescale[:, None], DT)
        top = highest
    out = (batch * SPLITS + split).to(tl.int64) * T * HEADS + q
    tl.store(tops + out, top, mask=here)
    tl.store(totals + out, total, mask=here)
    tl.store(parts + out[:, None] * R + r[None, :], acc, mask=here[:, None])


@triton.jit
def combine_v_proj_kernel(
    parts, tops, totals, place, positions, words, scales, offsets, out, scratch,
    M: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, V: tl.constexpr, SLOTS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, PER_WORD: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The shares of the attention put together and projected to values; programs (head, tile of values, rows)."""
    head, column, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pm * BM + tl.arange(0, BM)
    here = rows < M
    r, s, n = tl.arange(0, R), tl.arange(0, BS), tl.arange(0, 64)
    own = scratch + (head * tl.num_programs(1) + column).to(tl.int64) * M * R
    for m in range(pm * BM, tl.minimum(pm * BM + BM, M)):
        first = head.to(tl.int64) + (m // T) * SPLITS * T * HEADS + (m % T) * HEADS
        length, share = split_bounds(positions, m // T, T, SLOTS, SPLITS, BLOCK)
        count = tl.cdiv(length, share)
        top = tl.full((), -1e30, tl.float32)
        for at in range(0, count, BS):
            inside = at + s < count
            top = tl.maximum(top, tl.max(tl.load(tops + first + (at + s) * T * HEADS, mask=inside, other=-1e30)))
        total = tl.zeros((), tl.float32)
        latent = tl.zeros((R,), tl.float32)
        for at in range(0, count, BS):
            inside = at + s < count
            where = first + (at + s) * T * HEADS
            weight = tl.exp(tl.load(tops + where, mask=inside, other=-1e30) - top)
            total += tl.sum(weight * tl.load(totals + where, mask=inside, other=0.0))
            part = tl.load(parts + where[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
            latent += tl.sum(part * weight[:, None], axis=0)
        latent = latent / tl.where(total > 0.0, total, 1.0)
        tl.store(own + m * R + r, latent.to(scratch.dtype.element_ty))
    tl.debug_barrier()
    tile = (tl.load(place).to(tl.int64) * HEADS + head) * TILES + column
    acc = dot_tile(
        tl.zeros((BM, 64), tl.float32), own, rows, here, own, words, scales, offsets, tile, 0, 0, CHUNKS, R, R,
        CHUNKS, GROUPS, GROUP, SUB, PER_WORD, KIND, BM, 64, False, SCALED, OFFSET, DT,
    )  # fmt: skip
    inside = here[:, None] & (column * 64 + n < V)[None, :]
    to = out + rows[:, None] * (HEADS * V) + head * V + column * 64 + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
