"""Kernel of causal attention of many new tokens over expanded keys and values.

A program takes a block of queries of one head through the keys that any of them sees, with an online softmax. Blocks of
keys that all its queries see come first and need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import dot_accumulate


@triton.jit
def load_keys(k_nope, k_rope, slot, slot_mask, DIMS: tl.constexpr, IS_MASKED: tl.constexpr):
    """Keys ``[BLOCK_N, KEY_TILE]``: a head's own part, followed by the part that all heads share.

    One load covers both: its columns select an array and a stride once, and one product follows instead of two.
    """
    KEY_TILE: tl.constexpr = DIMS.key_tile
    h = tl.arange(0, KEY_TILE)[None, :]
    is_nope = h < DIMS.nope
    stride = tl.where(is_nope, DIMS.heads * DIMS.nope, DIMS.rope)
    pointers = tl.where(is_nope, k_nope, k_rope) + (slot[:, None] * stride + tl.where(is_nope, h, h - DIMS.nope))
    if DIMS.nope + DIMS.rope < KEY_TILE:
        keys = tl.load(pointers, mask=slot_mask[:, None] & (h < DIMS.nope + DIMS.rope), other=0.0)
    elif IS_MASKED:
        keys = tl.load(pointers, mask=slot_mask[:, None], other=0.0)
    else:
        keys = tl.load(pointers)
    return keys


@triton.jit
def load_values(v, slot, slot_mask, FIRST: tl.constexpr, DIMS: tl.constexpr, IS_MASKED: tl.constexpr):
    """Values ``[BLOCK_N, VALUE_TILE]``, columns from FIRST on."""
    VALUE_TILE: tl.constexpr = DIMS.value_tile
    w = FIRST + tl.arange(0, VALUE_TILE)[None, :]
    pointers = v + slot[:, None] * (DIMS.heads * DIMS.value_dim) + w
    if FIRST + VALUE_TILE > DIMS.value_dim:
        values = tl.load(pointers, mask=slot_mask[:, None] & (w < DIMS.value_dim), other=0.0)
    elif IS_MASKED:
        values = tl.load(pointers, mask=slot_mask[:, None], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def online_softmax_step(
    q, k_nope, k_rope, v, acc_low, acc_high, row_max, row_sum, num_visible, stop, start, DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXP2_SCALE: tl.constexpr, IS_MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The online softmax after the block of keys that begins at ``start``.

    ``acc_low`` and ``acc_high`` are the two halves of the weighted sums of values, ``row_max`` the largest scores
    before scaling, ``row_sum`` the sums of exponentials.
    """
    n = tl.arange(0, BLOCK_N)
    slot, slot_mask = start + n, n < stop - start
    keys = load_keys(k_nope, k_rope, slot, slot_mask, DIMS, IS_MASKED).to(DTYPE)
    scores = dot_accumulate(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), DTYPE)
    if IS_MASKED:
        # The running maximum is finite, so that a row with no visible key gives zeros and no NaN.
        scores = tl.where(n[None, :] < (num_visible - start)[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.exp2(scores * EXP2_SCALE - (new_max * EXP2_SCALE)[:, None])
    rescale = tl.exp2((row_max - new_max) * EXP2_SCALE)
    row_sum = row_sum * rescale + tl.sum(weights, axis=1)
    weights = weights.to(DTYPE)
    low = load_values(v, slot, slot_mask, 0, DIMS, IS_MASKED).to(DTYPE)
    acc_low = dot_accumulate(weights, low, acc_low * rescale[:, None], DTYPE)
    if DIMS.value_dim > DIMS.value_tile:
        high = load_values(v, slot, slot_mask, DIMS.value_tile, DIMS, IS_MASKED).to(DTYPE)
        acc_high = dot_accumulate(weights, high, acc_high * rescale[:, None], DTYPE)
    return acc_low, acc_high, new_max, row_sum


@triton.jit
def flash_attention_kernel(
    q, k_nope, k_rope, v, positions, first_key, out, lse,
    BATCH: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, HEADS_PER_WAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EMPTY_LSE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``softmax(SCALE * q @ k.T) @ v``; a grid of one axis.

    HEADS_PER_WAVE heads (of all batch elements) run at the same time, so that their keys stay in the L2 cache. The last
    queries run first, because they have most keys.
    """
    HEADS: tl.constexpr = DIMS.heads
    KEY_WIDTH: tl.constexpr = DIMS.nope + DIMS.rope
    V: tl.constexpr = DIMS.value_dim
    KEY_TILE: tl.constexpr = DIMS.key_tile
    VALUE_TILE: tl.constexpr = DIMS.value_tile
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    wave = pid // (HEADS_PER_WAVE * BLOCKS)
    heads_in_wave = tl.minimum(HEADS_PER_WAVE, BATCH * HEADS - wave * HEADS_PER_WAVE)
    pid -= wave * (HEADS_PER_WAVE * BLOCKS)
    batch_head, block = wave * HEADS_PER_WAVE + pid % heads_in_wave, BLOCKS - 1 - pid // heads_in_wave
    batch, head = (batch_head // HEADS).to(tl.int64), (batch_head % HEADS).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = m < TOKENS
    position = tl.load(positions + batch * TOKENS + m, mask=row_mask, other=0)
    # A query sees the first ``num_visible`` keys.
    num_visible = tl.minimum(position - tl.load(first_key) + 1, KEYS)
    stop = tl.max(tl.where(row_mask, num_visible, 0), axis=0)
    unmasked_stop = tl.maximum(tl.min(tl.where(row_mask, num_visible, KEYS), axis=0), 0) // BLOCK_N * BLOCK_N
    h, w = tl.arange(0, KEY_TILE)[None, :], tl.arange(0, VALUE_TILE)[None, :]
    q_rows = q + (batch * TOKENS * HEADS + head) * KEY_WIDTH + m[:, None] * (HEADS * KEY_WIDTH)
    query = tl.load(q_rows + h, mask=row_mask[:, None] & (h < KEY_WIDTH), other=0.0).to(DTYPE)
    k_nope += (batch * KEYS * HEADS + head) * DIMS.nope
    k_rope += batch * KEYS * DIMS.rope
    v += (batch * KEYS * HEADS + head) * V
    EXP2_SCALE: tl.constexpr = SCALE * 1.4426950408889634
    row_max, row_sum = tl.full((BLOCK_M,), EMPTY_LSE, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc_low = tl.zeros((BLOCK_M, VALUE_TILE), tl.float32)
    acc_high = acc_low
    for start in range(0, unmasked_stop, BLOCK_N):
        acc_low, acc_high, row_max, row_sum = online_softmax_step(
            query, k_nope, k_rope, v, acc_low, acc_high, row_max, row_sum, num_visible, stop, start, DIMS, BLOCK_M,
            BLOCK_N, EXP2_SCALE, False, DTYPE,
        )  # fmt: skip
    for start in range(unmasked_stop, stop, BLOCK_N):
        acc_low, acc_high, row_max, row_sum = online_softmax_step(
            query, k_nope, k_rope, v, acc_low, acc_high, row_max, row_sum, num_visible, stop, start, DIMS, BLOCK_M,
            BLOCK_N, EXP2_SCALE, True, DTYPE,
        )  # fmt: skip
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    lse_position = (batch * TOKENS + m) * HEADS + head
    tl.store(lse + lse_position, tl.where(is_empty, EMPTY_LSE, row_max * SCALE + tl.log(row_sum)), mask=row_mask)
    target = out + (batch * TOKENS * HEADS + head) * V + m[:, None] * (HEADS * V) + w
    inv_sum = (1.0 / row_sum)[:, None]
    tl.store(target, (acc_low * inv_sum).to(out.dtype.element_ty), mask=row_mask[:, None] & (w < V))
    if V > VALUE_TILE:
        high_mask = row_mask[:, None] & (VALUE_TILE + w < V)
        tl.store(target + VALUE_TILE, (acc_high * inv_sum).to(out.dtype.element_ty), mask=high_mask)
