"""What the matrix kernels share, as Triton device functions: products with weights in tiles (see ``tiles.py``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def value_of(code, KIND: tl.constexpr, DT: tl.constexpr):
    """The values of codes, in the dtype that products are computed in.

    Integers of 4 bits take the low bits of the bfloat16 128, whose unit they are, and those of 8 bits the low bits of
    the float32 2^23; a subtraction, which is exact, leaves the value. No conversion instruction is needed for 4 bits.
    """
    if KIND == "int4" or KIND == "uint4":
        zero: tl.constexpr = 8 if KIND == "int4" else 0
        if DT == tl.bfloat16:
            return (code | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True) - (128.0 + zero)
        return ((code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)).to(DT)
    if KIND == "int8" or KIND == "uint8":
        flip: tl.constexpr = 128 if KIND == "int8" else 0
        return (((code ^ flip) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + flip)).to(DT)
    if KIND == "fp8":
        # As float16 the same bits, moved, stand for the value times 2^-8, subnormal numbers included.
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DT)
    if KIND == "fp4":
        half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 16384.0).to(DT)
    if KIND == "bfloat16":
        if DT == tl.bfloat16:
            return code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return (code << 16).to(tl.float32, bitcast=True).to(DT)
    return code.to(tl.float32, bitcast=True).to(DT)


@triton.jit
def plane(words, i, KIND: tl.constexpr, PER_WORD: tl.constexpr, DT: tl.constexpr):
    """The values of the i-th codes of words, of which each holds so many."""
    if PER_WORD == 1:
        return value_of(words, KIND, DT)
    bits: tl.constexpr = 32 // PER_WORD
    return value_of((words >> (bits * i)) & ((1 << bits) - 1), KIND, DT)


@triton.jit
def product(a, b, acc, DT: tl.constexpr):
    """``acc + a @ b``; float32 means float32, and not the 19 bits of TF32."""
    if DT == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def dot_tile(
    acc,
    x,
    rows,
    here,
    norm,
    words,
    scales,
    offsets,
    tile,
    first,
    start,
    stop,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    PER_WORD: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    OFFSET: tl.constexpr,
    DT: tl.constexpr,
):
    """``acc + (x[rows] * norm) @ w[tile].T`` over some of the chunks: float32 ``[BM, BN]``.

    Args:
        acc: float32 ``[BM, BN]``.
        x: rows of K values, STRIDE apart.
        rows: int ``[BM]``; only those ``here`` are read, the others are zero.
        norm: factors of the inputs ``[K]``, if NORM.
        words, scales, offsets: of the whole stack.
        tile: number of the tile in it, as a 64-bit integer.
        first: first output in the tile.
        start, stop: chunks.
        SUB: inputs read between two scales, where there are groups.
    """
    r = tl.arange(0, 16)
    n = tl.arange(0, BN)
    size: tl.constexpr = PER_WORD * 16
    runs: tl.constexpr = size // SUB
    planes: tl.constexpr = SUB // 16
    total = tl.zeros((BM,), tl.float32)
    block = words + tile * (CHUNKS * 16 * 64) + first + r[:, None] * 64 + n[None, :]
    for c in range(start, stop):
        w = tl.load(block + c * (16 * 64), eviction_policy="evict_first")
        for run in tl.static_range(runs):
            part = tl.zeros((BM, BN), tl.float32) if GROUP else acc
            for j in tl.static_range(planes):
                k = c * size + (run * planes + j) * 16 + r
                inside = here[:, None] & (k < K)[None, :] if K % size else here[:, None]
                xs = tl.load(x + rows[:, None] * STRIDE + k[None, :], mask=inside, other=0.0).to(tl.float32)
                if NORM:
                    xs = xs * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
                part = product(xs.to(DT), plane(w, run * planes + j, KIND, PER_WORD, DT), part, DT)
                if OFFSET:
                    total += tl.sum(xs, axis=1)
            if GROUP:
                place = (tile * GROUPS + (c * size + run * SUB) // GROUP) * 64 + first + n
                acc += part * tl.load(scales + place).to(tl.float32)[None, :]
                if OFFSET:
                    acc += total[:, None] * tl.load(offsets + place)[None, :]
                    total = tl.zeros((BM,), tl.float32)
            else:
                acc = part
    if SCALED and not GROUP:
        acc = acc * tl.load(scales + tile * 64 + first + n).to(tl.float32)[None, :]
        if OFFSET:
            acc += total[:, None] * tl.load(offsets + tile * 64 + first + n)[None, :]
    return acc


@triton.jit
def dot_pair(
    x, rows, here, words, scales, offsets, other_words, other_scales, other_offsets, tile, first, stop,
    K: tl.constexpr, STRIDE: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    SUB: tl.constexpr, PER_WORD: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCALED: tl.constexpr, OFFSET: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The same for two matrices of one layout, whose inputs are then read once; no factors of the inputs."""
    r = tl.arange(0, 16)
    n = tl.arange(0, BN)
    size: tl.constexpr = PER_WORD * 16
    runs: tl.constexpr = size // SUB
    planes: tl.constexpr = SUB // 16
    one = tl.zeros((BM, BN), tl.float32)
    two = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    at = tile * (CHUNKS * 16 * 64) + first + r[:, None] * 64 + n[None, :]
    for c in range(stop):
        v = tl.load(words + at + c * (16 * 64), eviction_policy="evict_first")
        w = tl.load(other_words + at + c * (16 * 64), eviction_policy="evict_first")
        for run in tl.static_range(runs):
            a = tl.zeros((BM, BN), tl.float32) if GROUP else one
            b = tl.zeros((BM, BN), tl.float32) if GROUP else two
            for j in tl.static_range(planes):
                k = c * size + (run * planes + j) * 16 + r
                inside = here[:, None] & (k < K)[None, :] if K % size else here[:, None]
                xs = tl.load(x + rows[:, None] * STRIDE + k[None, :], mask=inside, other=0.0)
                a = product(xs.to(DT), plane(v, run * planes + j, KIND, PER_WORD, DT), a, DT)
                b = product(xs.to(DT), plane(w, run * planes + j, KIND, PER_WORD, DT), b, DT)
                if OFFSET:
                    total += tl.sum(xs.to(tl.float32), axis=1)
            if GROUP:
                place = (tile * GROUPS + (c * size + run * SUB) // GROUP) * 64 + first + n
                one += a * tl.load(scales + place).to(tl.float32)[None, :]
                two += b * tl.load(other_scales + place).to(tl.float32)[None, :]
                if OFFSET:
                    one += total[:, None] * tl.load(offsets + place)[None, :]
                    two += total[:, None] * tl.load(other_offsets + place)[None, :]
                    total = tl.zeros((BM,), tl.float32)
            else:
                one, two = a, b
    if SCALED and not GROUP:
        place = tile * 64 + first + n
        one = one * tl.load(scales + place).to(tl.float32)[None, :]
        two = two * tl.load(other_scales + place).to(tl.float32)[None, :]
        if OFFSET:
            one += total[:, None] * tl.load(offsets + place)[None, :]
            two += total[:, None] * tl.load(other_offsets + place)[None, :]
    return one, two


@triton.jit
def rms_factor(
    squares, rows, here, eps, D: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr, ALL_PARTS: tl.constexpr
):  # fmt: skip
    """``1 / rms`` of rows of D values, from their sums of squares by block of columns."""
    wide: tl.constexpr = triton.next_power_of_2(PARTS)
    p = tl.arange(0, wide)
    inside = here[:, None] & (p < PARTS)[None, :]
    part = tl.load(squares + rows[:, None] * ALL_PARTS + FIRST + p[None, :], mask=inside, other=0.0)
    return tl.rsqrt(tl.sum(part, axis=1) / D + eps)
