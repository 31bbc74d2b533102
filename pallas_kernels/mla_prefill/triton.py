"""Causal attention of many new tokens over keys and values that are there for every head.

A program takes a block of queries of one head through the keys that any of them sees, with a running softmax. Blocks of
keys that all of them see come first and need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._tile_dot import dot_accumulate


@triton.jit
def load_keys(
    nope, rope, slot, inside, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, H: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys ``[BN, H]``: a head's own part and, behind it, the part that all heads share.

    One load of both: its columns choose an array and a stride once, and a product of one tile follows, not of two.
    """
    h = tl.arange(0, H)[None, :]
    own = h < NOPE
    stride = tl.where(own, HEADS * NOPE, ROPE)
    at = tl.where(own, nope, rope) + (slot[:, None] * stride + tl.where(own, h, h - NOPE))
    if NOPE + ROPE < H:
        keys = tl.load(at, mask=inside[:, None] & (h < NOPE + ROPE), other=0.0)
    elif MASKED:
        keys = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        keys = tl.load(at)
    return keys


@triton.jit
def load_values(
    v, slot, inside, FIRST: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """W columns of the values ``[BN, V]``, from FIRST on."""
    w = FIRST + tl.arange(0, W)[None, :]
    at = v + slot[:, None] * (HEADS * V) + w
    if FIRST + W > V:
        values = tl.load(at, mask=inside[:, None] & (w < V), other=0.0)
    elif MASKED:
        values = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        values = tl.load(at)
    return values


@triton.jit
def online_softmax_step(
    q, nope, rope, v, one, two, top, total, seen, stop, at, HEADS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, V: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FACTOR: tl.constexpr, MASKED: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The running softmax after one more block of keys, which begins ``at``.

    ``one`` and ``two`` are halves of the sums of values, ``top`` the largest scores before the factor, ``total`` the
    sums of exponentials.
    """
    n = tl.arange(0, BN)
    slot, inside = at + n, n < stop - at
    keys = load_keys(nope, rope, slot, inside, HEADS, NOPE, ROPE, H, MASKED).to(DT)
    scores = dot_accumulate(q, tl.trans(keys), tl.zeros((BM, BN), tl.float32), DT)
    if MASKED:
        # The running maximum is finite, so that a row of nothing else gives zeros and no NaN.
        scores = tl.where(n[None, :] < (seen - at)[:, None], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores * FACTOR - (highest * FACTOR)[:, None])
    rescale = tl.exp2((top - highest) * FACTOR)
    total = total * rescale + tl.sum(weights, axis=1)
    weights = weights.to(DT)
    first = load_values(v, slot, inside, 0, HEADS, V, W, MASKED).to(DT)
    one = dot_accumulate(weights, first, one * rescale[:, None], DT)
    if V > W:
        second = load_values(v, slot, inside, W, HEADS, V, W, MASKED).to(DT)
        two = dot_accumulate(weights, second, two * rescale[:, None], DT)
    return one, two, highest, total


@triton.jit
def flash_attention_kernel(
    q, nope, rope, v, positions, first_key, out, lse,
    BATCH: tl.constexpr, T: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, V: tl.constexpr, TOGETHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr, EMPTY: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``softmax(scale * q @ k.T) @ v``; one axis of programs.

    TOGETHER heads (of all rows of the batch) go at the same time, so that their keys stay in the L2 cache, the last
    queries first, which have most to do.
    """
    BLOCKS: tl.constexpr = (T + BM - 1) // BM
    who = tl.program_id(0)
    group = who // (TOGETHER * BLOCKS)
    size = tl.minimum(TOGETHER, BATCH * HEADS - group * TOGETHER)
    who -= group * (TOGETHER * BLOCKS)
    pair, block = group * TOGETHER + who % size, BLOCKS - 1 - who // size
    batch, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    m = block * BM + tl.arange(0, BM)
    here = m < T
    position = tl.load(positions + batch * T + m, mask=here, other=0)
    # A query sees so many of the keys, from the first on.
    seen = tl.minimum(position - tl.load(first_key) + 1, S)
    stop = tl.max(tl.where(here, seen, 0), axis=0)
    full = tl.maximum(tl.min(tl.where(here, seen, S), axis=0), 0) // BN * BN
    h, w = tl.arange(0, H)[None, :], tl.arange(0, W)[None, :]
    mine = q + (batch * T * HEADS + head) * (NOPE + ROPE) + m[:, None] * (HEADS * (NOPE + ROPE))
    query = tl.load(mine + h, mask=here[:, None] & (h < NOPE + ROPE), other=0.0).to(DT)
    nope += (batch * S * HEADS + head) * NOPE
    rope += batch * S * ROPE
    v += (batch * S * HEADS + head) * V
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634
    top, total = tl.full((BM,), EMPTY, tl.float32), tl.zeros((BM,), tl.float32)
    one = tl.zeros((BM, W), tl.float32)
    two = one
    for at in range(0, full, BN):
        one, two, top, total = online_softmax_step(
            query, nope, rope, v, one, two, top, total, seen, stop, at, HEADS, NOPE, ROPE, V, H, W, BM, BN, FACTOR,
            False, DT,
        )  # fmt: skip
    for at in range(full, stop, BN):
        one, two, top, total = online_softmax_step(
            query, nope, rope, v, one, two, top, total, seen, stop, at, HEADS, NOPE, ROPE, V, H, W, BM, BN, FACTOR,
            True, DT,
        )  # fmt: skip
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    at = (batch * T + m) * HEADS + head
    tl.store(lse + at, tl.where(nothing, EMPTY, top * SCALE + tl.log(total)), mask=here)
    to = out + (batch * T * HEADS + head) * V + m[:, None] * (HEADS * V) + w
    share = (1.0 / total)[:, None]
    tl.store(to, (one * share).to(out.dtype.element_ty), mask=here[:, None] & (w < V))
    if V > W:
        tl.store(to + W, (two * share).to(out.dtype.element_ty), mask=here[:, None] & (W + w < V))
