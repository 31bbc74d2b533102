"""Kernels of attention over the latent cache: queries and the new cache rows, attention in splits, values."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import TilePointers, dot_accumulate, dot_tile, inv_rms, load_sum_sq


@triton.jit
def load_rotated(pointer, mask, cos, sin, DIMS: tl.constexpr):
    """Both halves of the rotated pairs ``[BLOCK_M, P / 2]`` of rows of P values at ``pointer``, ``[BLOCK_M, 1]``."""
    j = tl.arange(0, DIMS.rope // 2)[None, :]
    first, second = (2 * j, 2 * j + 1) if DIMS.interleave else (j, j + DIMS.rope // 2)
    a = tl.load(pointer + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(pointer + second, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def round_half_even(x):
    """Nearest integers of float32 below 2^22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def abs_or_inf(x):
    """Magnitudes; infinite for a NaN, which a GPU's maximum would ignore."""
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def quant_scale(max_abs, QMAX: tl.constexpr):
    """Scale of values up to ``max_abs``; see ``glm_jax.cache``. An infinite scale turns its values into NaN."""
    scale = tl.div_rn(max_abs, tl.full(max_abs.shape, QMAX, tl.float32))
    return tl.where(scale < 1.1754943508222875e-38, 0.0, scale)


@triton.jit
def quantize_rows(x, scale, QMAX: tl.constexpr, IS_FP8: tl.constexpr):
    """8-bit qvalues of rows ``[BLOCK_M, n]`` with scales ``[BLOCK_M]``."""
    scaled = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(x))
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -QMAX), QMAX)
    if IS_FP8:
        # float8 e4m3 by hand, the same on every GPU: three bits of mantissa, ties to even; units of 2^-9 below 2^-6.
        magnitude = tl.abs(scaled)
        bits = magnitude.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        code = tl.where(magnitude < 0.015625, round_half_even(magnitude * 512.0).to(tl.uint32), normal)
        qvalues = (code | ((scaled < 0.0).to(tl.uint32) << 7)).to(tl.uint8)
    else:
        qvalues = round_half_even(scaled).to(tl.int8)
    return qvalues


@triton.jit
def cache_row_index(page_table, layer, batch, slot, mask, CACHE: tl.constexpr):
    """Row of the cache that holds a slot of a sequence; ``layer`` is a 64-bit integer."""
    PAGE_SIZE: tl.constexpr = CACHE.page_size
    if PAGE_SIZE:
        page = tl.load(page_table + batch * (CACHE.capacity // PAGE_SIZE) + slot // PAGE_SIZE, mask=mask, other=0)
        return layer * CACHE.pool_size + page.to(tl.int64) * PAGE_SIZE + slot % PAGE_SIZE
    return (layer * CACHE.batch_size + batch) * CACHE.capacity + slot


@triton.jit
def write_cache_rows(
    a, sum_sq, positions, cos, sin, page_table, cache, cache_scales, queries, layer, rows, row_mask,
    TOKENS: tl.constexpr, DIMS: tl.constexpr, CACHE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Writes the normalized latents and rotated rope keys of new tokens into a layer of the cache."""
    P: tl.constexpr = DIMS.rope
    Q: tl.constexpr = DIMS.query_latent
    R: tl.constexpr = DIMS.latent
    WIDTH: tl.constexpr = Q + R + P
    j = tl.arange(0, P // 2)
    position = tl.load(positions + rows, mask=row_mask, other=0)
    is_stored = row_mask & (position >= 0) & (position < CACHE.capacity)
    mask = is_stored[:, None]
    row = cache_row_index(page_table, layer, rows // TOKENS, position, is_stored, CACHE)
    r = tl.arange(0, R)[None, :]
    latent = tl.load(a + rows[:, None] * WIDTH + Q + r, mask=row_mask[:, None], other=0.0).to(tl.float32)
    latent = latent * inv_rms(load_sum_sq(sum_sq, rows, row_mask, NORM), NORM, R)[:, None]
    # A row is rounded to the dtype of the activations before it is stored in 8 bits.
    latent = latent.to(queries.dtype.element_ty).to(tl.float32)
    first, second = load_rotated(a + rows[:, None] * WIDTH + Q + R, row_mask[:, None], cos, sin, DIMS)
    first = first.to(queries.dtype.element_ty).to(tl.float32)
    second = second.to(queries.dtype.element_ty).to(tl.float32)
    first_column, second_column = (2 * j, 2 * j + 1) if DIMS.interleave else (j, j + P // 2)
    out = cache + row[:, None] * (R + P)
    if CACHE.kind == "int8" or CACHE.kind == "fp8":
        IS_FP8: tl.constexpr = CACHE.kind == "fp8"
        QMAX: tl.constexpr = 127.0 if CACHE.kind == "int8" else 448.0
        scale = quant_scale(tl.max(abs_or_inf(latent), axis=1), QMAX)
        key_scale = quant_scale(tl.max(tl.maximum(abs_or_inf(first), abs_or_inf(second)), axis=1), QMAX)
        latent = quantize_rows(latent, scale, QMAX, IS_FP8)
        first = quantize_rows(first, key_scale, QMAX, IS_FP8)
        second = quantize_rows(second, key_scale, QMAX, IS_FP8)
        tl.store(cache_scales + row * 2, scale, mask=is_stored)
        tl.store(cache_scales + row * 2 + 1, key_scale, mask=is_stored)
    tl.store(out + r, latent.to(cache.dtype.element_ty), mask=mask)
    tl.store(out + R + first_column[None, :], first.to(cache.dtype.element_ty), mask=mask)
    tl.store(out + R + second_column[None, :], second.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def absorbed_q_proj_kernel(
    a, sum_sq, layer_index, positions, cos_sin, page_table, q_b_packed, q_b_scales, q_b_offsets, k_b_packed,
    k_b_input_scales, cache_in, cache_scales_in, queries, scratch, cache, cache_scales,
    M: tl.constexpr, TOKENS: tl.constexpr, DIMS: tl.constexpr, CACHE: tl.constexpr, CACHE_LAYER_OFFSET: tl.constexpr,
    Q_NORM: tl.constexpr, KV_NORM: tl.constexpr, DTYPE: tl.constexpr, Q_B: tl.constexpr, K_B: tl.constexpr,
    INPUT_SCALE_SETS: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr, BLOCK_M: tl.constexpr, Q_BLOCK_N: tl.constexpr,
    K_BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Absorbed queries, and the rows of the new tokens in the cache.

    The grid is (heads times shares of the latents, plus one; blocks of rows). Every program of a head computes the
    head's query again, so that there are enough programs and none waits for another. It does so Q_BLOCK_N outputs at a
    time, and then K_BLOCK_N: wide blocks restart the pipeline of loads less often. The last program along the first
    axis writes the cache. ``layer_index`` is that of the weights; CACHE_LAYER_OFFSET more is that of the cache.
    """
    HEADS: tl.constexpr = DIMS.heads
    NOPE: tl.constexpr = DIMS.nope
    P: tl.constexpr = DIMS.rope
    Q: tl.constexpr = DIMS.query_latent
    R: tl.constexpr = DIMS.latent
    LATENT_TILES: tl.constexpr = K_B.num_tiles
    pid, pm = tl.program_id(0), tl.program_id(1)
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    WIDTH: tl.constexpr = Q + R + P
    j = tl.arange(0, P // 2)
    angle = rows[:, None] * (P // 2) + j[None, :]
    cos = tl.load(cos_sin + angle, mask=row_mask[:, None], other=0.0).to(tl.float32)
    sin = tl.load(cos_sin + M * (P // 2) + angle, mask=row_mask[:, None], other=0.0).to(tl.float32)
    layer = tl.load(layer_index).to(tl.int64)
    SHARES: tl.constexpr = LATENT_TILES // TILES_PER_PROGRAM
    if pid < HEADS * SHARES:
        head, share = pid // SHARES, pid % SHARES
        H: tl.constexpr = NOPE + P
        own_rows = scratch + (pid.to(tl.int64) * M + rows[:, None]) * H
        norm_partials = load_sum_sq(sum_sq, rows, row_mask, Q_NORM)
        q_b = TilePointers(q_b_packed, q_b_scales, q_b_offsets)
        n = tl.arange(0, Q_BLOCK_N)
        for t in range(H // Q_BLOCK_N):
            tile = layer * Q_B.num_tiles + head * (H // 64) + t * (Q_BLOCK_N // 64)
            q = dot_tile(
                tl.zeros((BLOCK_M, Q_BLOCK_N), tl.float32), a, rows, row_mask, a, q_b, Q_B, tile, 0, 0, Q_B.num_chunks,
                WIDTH, BLOCK_M, Q_BLOCK_N, False, DTYPE,
            )  # fmt: skip
            q = q * inv_rms(norm_partials, Q_NORM, Q)[:, None]
            tl.store(own_rows + t * Q_BLOCK_N + n[None, :], q.to(scratch.dtype.element_ty), mask=row_mask[:, None])
        tl.debug_barrier()
        target = queries + (rows[:, None].to(tl.int64) * HEADS + head) * (R + P)
        if share == 0:
            first, second = load_rotated(own_rows + NOPE, row_mask[:, None], cos, sin, DIMS)
            first_column, second_column = (2 * j, 2 * j + 1) if DIMS.interleave else (j, j + P // 2)
            tl.store(target + R + first_column[None, :], first.to(queries.dtype.element_ty), mask=row_mask[:, None])
            tl.store(target + R + second_column[None, :], second.to(queries.dtype.element_ty), mask=row_mask[:, None])
        own = scratch + pid.to(tl.int64) * M * H
        k_b = TilePointers(k_b_packed, k_b_packed, k_b_packed)
        n = tl.arange(0, K_BLOCK_N)
        for t in range(TILES_PER_PROGRAM * 64 // K_BLOCK_N):
            latent_tile = share * TILES_PER_PROGRAM + t * (K_BLOCK_N // 64)
            tile = (layer * HEADS + head) * LATENT_TILES + latent_tile
            scale_set = (layer * HEADS + head) * INPUT_SCALE_SETS + latent_tile * INPUT_SCALE_SETS // LATENT_TILES
            input_scales = k_b_input_scales + scale_set * NOPE
            absorbed = dot_tile(
                tl.zeros((BLOCK_M, K_BLOCK_N), tl.float32), own, rows, row_mask, input_scales, k_b, K_B, tile, 0, 0,
                K_B.num_chunks, H, BLOCK_M, K_BLOCK_N, INPUT_SCALE_SETS > 0, DTYPE,
            )  # fmt: skip
            mask = row_mask[:, None] & (latent_tile * 64 + n < R)[None, :]
            tl.store(target + latent_tile * 64 + n[None, :], absorbed.to(queries.dtype.element_ty), mask=mask)
    else:
        write_cache_rows(
            a, sum_sq, positions, cos, sin, page_table, cache, cache_scales, queries, layer + CACHE_LAYER_OFFSET, rows,
            row_mask, TOKENS, DIMS, CACHE, KV_NORM,
        )  # fmt: skip


@triton.jit
def dequantize_cache(data, CACHE: tl.constexpr, DTYPE: tl.constexpr):
    """Cached rows without their scale, in the dtype of the products."""
    if CACHE.kind == "fp8":
        bits = data.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DTYPE)
    return data.to(tl.float32).to(DTYPE) if CACHE.kind == "int8" else data.to(DTYPE)


@triton.jit
def split_bounds(
    positions, batch, TOKENS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Cached rows that the tokens of a sequence see, and the rows of one split."""
    t = tl.arange(0, triton.next_power_of_2(TOKENS))
    newest = tl.max(tl.load(positions + batch * TOKENS + t, mask=t < TOKENS, other=0), axis=0)
    length = tl.maximum(tl.minimum(newest + 1, CAPACITY), 0)
    return length, tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S), 1) * BLOCK_S


@triton.jit
def flash_decode_kernel(
    queries, cache, cache_scales, page_table, layer_index, positions, acc, row_max, row_sum,
    TOKENS: tl.constexpr, DIMS: tl.constexpr, CACHE: tl.constexpr, CACHE_LAYER_OFFSET: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Attention of all heads over a split of the cached rows; grid (splits, blocks of queries, sequences).

    Cached rows are read once, for scores and values. Each split writes its largest score, sum of exponentials and
    unnormalized sum of latents; a split without rows writes nothing.
    """
    split, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, rows_per_split = split_bounds(positions, batch, TOKENS, CACHE.capacity, SPLITS, BLOCK_S)
    start, stop = split * rows_per_split, tl.minimum(split * rows_per_split + rows_per_split, length)
    if start < stop:
        flash_decode_split(
            queries, cache, cache_scales, page_table, layer_index, positions, acc, row_max, row_sum, split, block,
            batch, start, stop, TOKENS, DIMS, CACHE, CACHE_LAYER_OFFSET, SPLITS, BLOCK_Q, BLOCK_S, DTYPE,
        )  # fmt: skip


@triton.jit
def flash_decode_split(
    queries, cache, cache_scales, page_table, layer_index, positions, acc_out, row_max_out, row_sum_out, split, block,
    batch, start, stop, TOKENS: tl.constexpr, DIMS: tl.constexpr, CACHE: tl.constexpr,
    CACHE_LAYER_OFFSET: tl.constexpr, SPLITS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program of :func:`flash_decode_kernel`, over the cached rows from ``start`` to ``stop``."""
    HEADS: tl.constexpr = DIMS.heads
    P: tl.constexpr = DIMS.rope
    R: tl.constexpr = DIMS.latent
    IS_QUANTIZED: tl.constexpr = CACHE.kind == "int8" or CACHE.kind == "fp8"
    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_mask = q < TOKENS * HEADS
    position = tl.load(positions + batch * TOKENS + q // HEADS, mask=query_mask, other=-1)
    r, p, s = tl.arange(0, R), tl.arange(0, P), tl.arange(0, BLOCK_S)
    query_rows = queries + (batch * TOKENS * HEADS + q[:, None]).to(tl.int64) * (R + P)
    q_latent = tl.load(query_rows + r[None, :], mask=query_mask[:, None], other=0.0).to(DTYPE)
    q_rope = tl.load(query_rows + R + p[None, :], mask=query_mask[:, None], other=0.0).to(DTYPE)
    row_max = tl.full((BLOCK_Q,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, R), tl.float32)
    layer = tl.load(layer_index).to(tl.int64) + CACHE_LAYER_OFFSET
    for first_slot in range(start, stop, BLOCK_S):
        slot = first_slot + s
        slot_mask = slot < stop
        # Blocks of rows begin at multiples of their size, which divides that of a page.
        rows = cache_row_index(page_table, layer, batch, first_slot, True, CACHE) + s
        row = cache + rows[:, None] * (R + P)
        latent = dequantize_cache(tl.load(row + r[None, :], mask=slot_mask[:, None], other=0), CACHE, DTYPE)
        rope_key = dequantize_cache(tl.load(row + R + p[None, :], mask=slot_mask[:, None], other=0), CACHE, DTYPE)
        scores = dot_accumulate(q_latent, tl.trans(latent), tl.zeros((BLOCK_Q, BLOCK_S), tl.float32), DTYPE)
        if IS_QUANTIZED:
            latent_scale = tl.load(cache_scales + rows * 2, mask=slot_mask, other=0.0)
            key_scale = tl.load(cache_scales + rows * 2 + 1, mask=slot_mask, other=0.0)
            rope_scores = dot_accumulate(q_rope, tl.trans(rope_key), tl.zeros((BLOCK_Q, BLOCK_S), tl.float32), DTYPE)
            scores = scores * latent_scale[None, :] + rope_scores * key_scale[None, :]
        else:
            scores = dot_accumulate(q_rope, tl.trans(rope_key), scores, DTYPE)
        visible = slot_mask[None, :] & (slot[None, :] <= position[:, None])
        scores = tl.where(visible, scores * DIMS.softmax_scale, -1e30)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp(scores - new_max[:, None]), 0.0)
        rescale = tl.exp(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        if IS_QUANTIZED:
            weights = weights * latent_scale[None, :]
        acc = dot_accumulate(weights.to(DTYPE), latent, acc * rescale[:, None], DTYPE)
        row_max = new_max
    out = (batch * SPLITS + split).to(tl.int64) * TOKENS * HEADS + q
    tl.store(row_max_out + out, row_max, mask=query_mask)
    tl.store(row_sum_out + out, row_sum, mask=query_mask)
    tl.store(acc_out + out[:, None] * R + r[None, :], acc, mask=query_mask[:, None])


@triton.jit
def combine_v_proj_kernel(
    acc, row_max, row_sum, layer_index, positions, packed, scales, offsets, out, scratch,
    M: tl.constexpr, TOKENS: tl.constexpr, DIMS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr, V_B: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS_PER_STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Combined splits, projected from latents to values; grid (heads, tiles of values, blocks of rows)."""
    HEADS: tl.constexpr = DIMS.heads
    R: tl.constexpr = DIMS.latent
    V: tl.constexpr = DIMS.value_dim
    head, value_tile, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    r, s, n = tl.arange(0, R), tl.arange(0, SPLITS_PER_STEP), tl.arange(0, 64)
    own = scratch + (head * tl.num_programs(1) + value_tile).to(tl.int64) * M * R
    for m in range(pm * BLOCK_M, tl.minimum(pm * BLOCK_M + BLOCK_M, M)):
        first_split = head.to(tl.int64) + (m // TOKENS) * SPLITS * TOKENS * HEADS + (m % TOKENS) * HEADS
        length, rows_per_split = split_bounds(positions, m // TOKENS, TOKENS, CAPACITY, SPLITS, SPLIT_BLOCK)
        filled_splits = tl.cdiv(length, rows_per_split)
        top = tl.full((), -1e30, tl.float32)
        for start in range(0, filled_splits, SPLITS_PER_STEP):
            mask = start + s < filled_splits
            split_max = tl.load(row_max + first_split + (start + s) * TOKENS * HEADS, mask=mask, other=-1e30)
            top = tl.maximum(top, tl.max(split_max))
        total = tl.zeros((), tl.float32)
        latent = tl.zeros((R,), tl.float32)
        for start in range(0, filled_splits, SPLITS_PER_STEP):
            mask = start + s < filled_splits
            split = first_split + (start + s) * TOKENS * HEADS
            weight = tl.exp(tl.load(row_max + split, mask=mask, other=-1e30) - top)
            total += tl.sum(weight * tl.load(row_sum + split, mask=mask, other=0.0))
            split_acc = tl.load(acc + split[:, None] * R + r[None, :], mask=mask[:, None], other=0.0)
            latent += tl.sum(split_acc * weight[:, None], axis=0)
        latent = latent / tl.where(total > 0.0, total, 1.0)
        tl.store(own + m * R + r, latent.to(scratch.dtype.element_ty))
    tl.debug_barrier()
    tile = (tl.load(layer_index).to(tl.int64) * HEADS + head) * V_B.num_tiles + value_tile
    values = dot_tile(
        tl.zeros((BLOCK_M, 64), tl.float32), own, rows, row_mask, own, TilePointers(packed, scales, offsets), V_B,
        tile, 0, 0, V_B.num_chunks, R, BLOCK_M, 64, False, DTYPE,
    )  # fmt: skip
    mask = row_mask[:, None] & (value_tile * 64 + n < V)[None, :]
    target = out + rows[:, None] * (HEADS * V) + head * V + value_tile * 64 + n[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=mask)
