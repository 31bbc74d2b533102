"""Products of many rows: a block of weights is turned into numbers once, for all the rows of a program."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._dequantize import dequant_planes
from pallas_kernels._tile_dot import dot_accumulate


@triton.jit
def load_weights(
    words, scales, offsets, column, n, c, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
    PER_WORD: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """A chunk of inputs by BN outputs, in the inputs' own order; scaled, where the scales differ within an output."""
    r, i = tl.arange(0, 16), tl.arange(0, PER_WORD)
    size: tl.constexpr = PER_WORD * 16
    w = tl.load(words + (column * (CHUNKS * 16 * 64) + n)[None, :] + (c * 16 + r)[:, None] * 64)
    wide: tl.constexpr = tl.float32 if SCALED and (GROUP > 0 or OFFSET) else DT
    values = dequant_planes(w[None, :, :], i[:, None, None], KIND, PER_WORD, wide)
    if SCALED and (GROUP > 0 or OFFSET):
        group = (c * size + i * 16) // GROUP if GROUP > 0 else i * 0
        place = (column * GROUPS * 64 + n)[None, :] + group[:, None] * 64
        values = values * tl.load(scales + place).to(tl.float32)[:, None, :]
        if OFFSET:
            values += tl.load(offsets + place)[:, None, :]
    return tl.reshape(values.to(DT), (size, BN))


@triton.jit
def apply_output_scales(acc, scales, column, n, GROUP: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr):
    """Sums over all inputs, times the scale of each output if it has only one."""
    if SCALED and GROUP == 0 and not OFFSET:
        acc = acc * tl.load(scales + column * 64 + n).to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_and_column(pn, n, BN: tl.constexpr):
    """Tile of each output of a block, and which of its outputs it is; so that the compiler sees how they lie."""
    if BN < 64:
        parts: tl.constexpr = 64 // BN
        return pn // parts + n * 0, (pn % parts) * BN + n
    return pn * (BN // 64) + n // 64, n % 64


@triton.jit
def load_block_rows(owners, rows, pm, M, BM: tl.constexpr, GROUPED: tl.constexpr):
    """Expert and rows of the pm-th block, and which of these are there."""
    at = pm * BM + tl.arange(0, BM)
    if GROUPED:
        row = tl.load(rows + at)
        return tl.load(owners + pm), row, row >= 0
    return 0, at, at < M


@triton.jit
def grouped_matmul_kernel(
    x, owners, rows, factors, place, words, scales, offsets, out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, PER_WORD: tl.constexpr, KIND: tl.constexpr,
    SCALED: tl.constexpr, OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr,
    FACTORS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``out[row] = factor[row] * (x[row] @ w[layer, expert].T)``; programs (block of rows, block of outputs)."""
    pm, pn = tl.program_id(0), tl.program_id(1)
    expert, row, here = load_block_rows(owners, rows, pm, M, BM, GROUPED)
    if expert >= 0:
        n = tl.arange(0, BN)
        column, inner = tile_and_column(pn, n, BN)
        column = (tl.load(place).to(tl.int64) * EXPERTS + expert) * TILES + column
        size: tl.constexpr = PER_WORD * 16
        acc = tl.zeros((BM, BN), tl.float32)
        for c in range(CHUNKS):
            k = c * size + tl.arange(0, size)
            inside = here[:, None] & (k < K)[None, :] if K % size else here[:, None]
            xs = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(DT)
            w = load_weights(
                words, scales, offsets, column, inner, c, GROUPS, CHUNKS, GROUP, PER_WORD, KIND, BN, SCALED, OFFSET, DT
            )
            acc = dot_accumulate(xs, w, acc, DT)
        acc = apply_output_scales(acc, scales, column, inner, GROUP, SCALED, OFFSET)
        if FACTORS:
            acc = acc * tl.load(factors + row, mask=here, other=0.0)[:, None]
        to = pn * BN + n
        at = out + row.to(tl.int64)[:, None] * N + to[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=here[:, None] & (to < N)[None, :])


@triton.jit
def gated_linear_unit_kernel(
    x, owners, rows, place, words, scales, offsets, o_words, o_scales, o_offsets, out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PER_ROW: tl.constexpr, EXPERTS: tl.constexpr,
    TILES: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, PER_WORD: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUPED: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``silu(x @ gate.T) * (x @ up.T)``, programs as before; PER_ROW rows of the result are of one row of x."""
    pm, pn = tl.program_id(0), tl.program_id(1)
    expert, row, here = load_block_rows(owners, rows, pm, M, BM, GROUPED)
    if expert >= 0:
        n = tl.arange(0, BN)
        column, inner = tile_and_column(pn, n, BN)
        column = (tl.load(place).to(tl.int64) * EXPERTS + expert) * TILES + column
        size: tl.constexpr = PER_WORD * 16
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        mine = x + (row // PER_ROW).to(tl.int64)[:, None] * K
        for c in range(CHUNKS):
            k = c * size + tl.arange(0, size)
            inside = here[:, None] & (k < K)[None, :] if K % size else here[:, None]
            xs = tl.load(mine + k[None, :], mask=inside, other=0.0).to(DT)
            w = load_weights(
                words, scales, offsets, column, inner, c, GROUPS, CHUNKS, GROUP, PER_WORD, KIND, BN, SCALED, OFFSET, DT
            )
            gate = dot_accumulate(xs, w, gate, DT)
            w = load_weights(
                o_words, o_scales, o_offsets, column, inner, c, GROUPS, CHUNKS, GROUP, PER_WORD, KIND, BN, SCALED,
                OFFSET, DT,
            )  # fmt: skip
            up = dot_accumulate(xs, w, up, DT)
        gate = apply_output_scales(gate, scales, column, inner, GROUP, SCALED, OFFSET)
        up = apply_output_scales(up, o_scales, column, inner, GROUP, SCALED, OFFSET)
        value = gate / (1.0 + tl.exp(-gate)) * up
        to = pn * BN + n
        at = out + row.to(tl.int64)[:, None] * N + to[None, :]
        tl.store(at, value.to(out.dtype.element_ty), mask=here[:, None] & (to < N)[None, :])
