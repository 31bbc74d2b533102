"""What the matrix kernels share, as Triton device functions: products with weights in tiles (see ``tiles.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._dequantize import dequant_plane


@triton.jit
def dot_accumulate(a, b, acc, DT: tl.constexpr):
    """``acc + a @ b``; float32 means float32, and not the 19 bits of TF32."""
    if tl.float32 == DT:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def scale_pointers(pointer, tile, first, GROUPS: tl.constexpr, BN: tl.constexpr):
    """Places ``[BN]`` of the scales of the first group."""
    n = first + tl.arange(0, BN)
    if BN > 64:
        return pointer + (tile + n // 64) * (GROUPS * 64) + n % 64
    return pointer + tile * (GROUPS * 64) + n


@triton.jit
def group_index(c, run, GROUP: tl.constexpr, SIZE: tl.constexpr, SUB: tl.constexpr):
    """Group of a run of a chunk's inputs; so that the compiler sees how groups follow each other."""
    if SIZE % GROUP == 0:
        return c * (SIZE // GROUP) + run * SUB // GROUP
    return (c * SIZE + run * SUB) // GROUP


@triton.jit
def load_scales(at, c, stop, GROUP: tl.constexpr, SIZE: tl.constexpr, SUB: tl.constexpr):
    """The scales of a chunk, one ``[BN]`` for each run of SUB inputs; of a chunk that is not there, anything."""
    held = ()
    for run in tl.static_range(SIZE // SUB):
        held = held + (tl.load(at + group_index(c, run, GROUP, SIZE, SUB) * 64, mask=c < stop),)
    return held


@triton.jit
def prefetch_scales(
    pointer, tile, start, GROUPS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Asks for the scales from some chunk on to be brought near.

    Words and inputs are on their way for several rounds of a loop, since Triton has what a product reads loaded early.
    Scales are too small for that: they are read one round before their use, which is not enough for memory.
    """
    line = tl.minimum(start * SIZE // GROUP + tl.arange(0, triton.next_power_of_2(GROUPS)), GROUPS - 1)
    for t in tl.static_range((BN + 63) // 64):
        address = (pointer + (tile + t) * (GROUPS * 64) + line * 64).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def packed_offsets(tile, first, CHUNKS: tl.constexpr, BN: tl.constexpr):
    """Places ``[16, BN]`` of the first chunk's words; for more than 64 outputs over tiles that follow each other."""
    r, n = tl.arange(0, 16), tl.arange(0, BN)
    if BN > 64:
        return (tile + n // 64)[None, :] * (CHUNKS * 16 * 64) + r[:, None] * 64 + (n % 64)[None, :]
    return tile * (CHUNKS * 16 * 64) + first + r[:, None] * 64 + n[None, :]


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
        tile: number of the tile in it, as a 64-bit integer; of the first, for more than 64 outputs.
        first: first output in the tile; 0 for 64 outputs or more.
        start, stop: chunks.
        SUB: inputs read between two scales, where there are groups.
    """
    r = tl.arange(0, 16)
    size: tl.constexpr = PER_WORD * 16
    runs: tl.constexpr = size // SUB
    planes: tl.constexpr = SUB // 16
    total = tl.zeros((BM,), tl.float32)
    at = words + packed_offsets(tile, first, CHUNKS, BN)
    if GROUP:
        if tl.bfloat16 == DT:
            prefetch_scales(scales, tile, start, GROUPS, GROUP, size, BN)
        held_at = scale_pointers(scales, tile, first, GROUPS, BN)
        held = load_scales(held_at, start, stop, GROUP, size, SUB)
    for c in range(start, stop):
        w = tl.load(at + c * (16 * 64), eviction_policy="evict_first")
        following = ()
        for run in tl.static_range(runs):
            part = tl.zeros((BM, BN), tl.float32) if GROUP else acc
            for j in tl.static_range(planes):
                k = c * size + (run * planes + j) * 16 + r
                inside = here[:, None] & (k < K)[None, :] if K % size else here[:, None]
                xs = tl.load(x + rows[:, None] * STRIDE + k[None, :], mask=inside, other=0.0).to(tl.float32)
                if NORM:
                    xs = xs * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
                part = dot_accumulate(xs.to(DT), dequant_plane(w, run * planes + j, KIND, PER_WORD, DT), part, DT)
                if OFFSET:
                    total += tl.sum(xs, axis=1)
            if GROUP:
                acc += part * held[run].to(tl.float32)[None, :]
                # Behind its use, so that it takes its predecessor's register and nobody waits for it to be moved.
                place = group_index(c + 1, run, GROUP, size, SUB) * 64
                following = following + (tl.load(held_at + place, mask=c + 1 < stop),)
                if OFFSET:
                    place = group_index(c, run, GROUP, size, SUB) * 64
                    acc += total[:, None] * tl.load(scale_pointers(offsets, tile, first, GROUPS, BN) + place)[None, :]
                    total = tl.zeros((BM,), tl.float32)
            else:
                acc = part
        if GROUP:
            held = following
    if SCALED and not GROUP:
        acc = acc * tl.load(scale_pointers(scales, tile, first, 1, BN)).to(tl.float32)[None, :]
        if OFFSET:
            acc += total[:, None] * tl.load(scale_pointers(offsets, tile, first, 1, BN))[None, :]
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
    size: tl.constexpr = PER_WORD * 16
    runs: tl.constexpr = size // SUB
    planes: tl.constexpr = SUB // 16
    one = tl.zeros((BM, BN), tl.float32)
    two = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    at = packed_offsets(tile, first, CHUNKS, BN)
    if GROUP:
        if tl.bfloat16 == DT:
            prefetch_scales(scales, tile, 0, GROUPS, GROUP, size, BN)
            prefetch_scales(other_scales, tile, 0, GROUPS, GROUP, size, BN)
        held_at = scale_pointers(scales, tile, first, GROUPS, BN)
        other_held_at = scale_pointers(other_scales, tile, first, GROUPS, BN)
        held = load_scales(held_at, 0, stop, GROUP, size, SUB)
        other_held = load_scales(other_held_at, 0, stop, GROUP, size, SUB)
    for c in range(stop):
        v = tl.load(words + at + c * (16 * 64), eviction_policy="evict_first")
        w = tl.load(other_words + at + c * (16 * 64), eviction_policy="evict_first")
        following, other_following = (), ()
        for run in tl.static_range(runs):
            a = tl.zeros((BM, BN), tl.float32) if GROUP else one
            b = tl.zeros((BM, BN), tl.float32) if GROUP else two
            for j in tl.static_range(planes):
                k = c * size + (run * planes + j) * 16 + r
                inside = here[:, None] & (k < K)[None, :] if K % size else here[:, None]
                xs = tl.load(x + rows[:, None] * STRIDE + k[None, :], mask=inside, other=0.0)
                a = dot_accumulate(xs.to(DT), dequant_plane(v, run * planes + j, KIND, PER_WORD, DT), a, DT)
                b = dot_accumulate(xs.to(DT), dequant_plane(w, run * planes + j, KIND, PER_WORD, DT), b, DT)
                if OFFSET:
                    total += tl.sum(xs.to(tl.float32), axis=1)
            if GROUP:
                one += a * held[run].to(tl.float32)[None, :]
                two += b * other_held[run].to(tl.float32)[None, :]
                place = group_index(c + 1, run, GROUP, size, SUB) * 64
                following = following + (tl.load(held_at + place, mask=c + 1 < stop),)
                other_following = other_following + (tl.load(other_held_at + place, mask=c + 1 < stop),)
                if OFFSET:
                    place = group_index(c, run, GROUP, size, SUB) * 64
                    one += total[:, None] * tl.load(scale_pointers(offsets, tile, first, GROUPS, BN) + place)[None, :]
                    two += (
                        total[:, None]
                        * tl.load(scale_pointers(other_offsets, tile, first, GROUPS, BN) + place)[None, :]
                    )
                    total = tl.zeros((BM,), tl.float32)
            else:
                one, two = a, b
        if GROUP:
            held, other_held = following, other_following
    if SCALED and not GROUP:
        one = one * tl.load(scale_pointers(scales, tile, first, 1, BN)).to(tl.float32)[None, :]
        two = two * tl.load(scale_pointers(other_scales, tile, first, 1, BN)).to(tl.float32)[None, :]
        if OFFSET:
            one += total[:, None] * tl.load(scale_pointers(offsets, tile, first, 1, BN))[None, :]
            two += total[:, None] * tl.load(scale_pointers(other_offsets, tile, first, 1, BN))[None, :]
    return one, two


@triton.jit
def load_sum_sq(
    squares, rows, here, FIRST: tl.constexpr, PARTS: tl.constexpr, ALL_PARTS: tl.constexpr
):  # fmt: skip
    """Sums of squares of rows by block of columns; what is read before a loop is there when it ends."""
    p = tl.arange(0, triton.next_power_of_2(PARTS))
    inside = here[:, None] & (p < PARTS)[None, :]
    return tl.load(squares + rows[:, None] * ALL_PARTS + FIRST + p[None, :], mask=inside, other=0.0)


@triton.jit
def inv_rms(parts, eps, D: tl.constexpr):
    """``1 / rms`` of rows of D values, from :func:`load_sum_sq`."""
    return tl.rsqrt(tl.sum(parts, axis=1) / D + eps)
