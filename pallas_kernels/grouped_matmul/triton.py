"""Kernels of products of many rows: a block of weights is dequantized once for all the rows of a program."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels._dequantize import dequant_planes
from pallas_kernels._tile_dot import TilePointers, dot_accumulate


@triton.jit
def load_weights(weight, LAYOUT: tl.constexpr, tile, n, c, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """Weights ``[inputs of chunk c, BLOCK_N]``; scaled here if the inputs of an output differ in scale."""
    PER_WORD: tl.constexpr = LAYOUT.qvalues_per_word
    GROUP_SIZE: tl.constexpr = LAYOUT.group_size
    HAS_OFFSETS: tl.constexpr = LAYOUT.has_offsets
    IS_SCALED_HERE: tl.constexpr = LAYOUT.has_scales and (GROUP_SIZE > 0 or HAS_OFFSETS)
    r, i = tl.arange(0, 16), tl.arange(0, PER_WORD)
    size: tl.constexpr = PER_WORD * 16
    words = tl.load(weight.packed + (tile * (LAYOUT.num_chunks * 16 * 64) + n)[None, :] + (c * 16 + r)[:, None] * 64)
    wide: tl.constexpr = tl.float32 if IS_SCALED_HERE else DTYPE
    values = dequant_planes(words[None, :, :], i[:, None, None], LAYOUT, wide)
    if IS_SCALED_HERE:
        group = (c * size + i * 16) // GROUP_SIZE if GROUP_SIZE > 0 else i * 0
        position = (tile * LAYOUT.num_groups * 64 + n)[None, :] + group[:, None] * 64
        values = values * tl.load(weight.scales + position).to(tl.float32)[:, None, :]
        if HAS_OFFSETS:
            values += tl.load(weight.offsets + position)[:, None, :]
    return tl.reshape(values.to(DTYPE), (size, BLOCK_N))


@triton.jit
def apply_output_scales(acc, weight, LAYOUT: tl.constexpr, tile, n):
    """Products over all inputs, multiplied by the scale of each output if an output has only one."""
    if LAYOUT.has_scales and LAYOUT.group_size == 0 and not LAYOUT.has_offsets:
        acc = acc * tl.load(weight.scales + tile * 64 + n).to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_and_output(pn, n, BLOCK_N: tl.constexpr):
    """Tile of each output of block ``pn`` and its index there, written so that the compiler sees the alignment."""
    if BLOCK_N < 64:
        blocks_per_tile: tl.constexpr = 64 // BLOCK_N
        return pn // blocks_per_tile + n * 0, (pn % blocks_per_tile) * BLOCK_N + n
    return pn * (BLOCK_N // 64) + n // 64, n % 64


@triton.jit
def load_block_rows(expert_ids, row_ids, pm, M, BLOCK_M: tl.constexpr, IS_GROUPED: tl.constexpr):
    """Expert and rows of block ``pm``, and the mask of rows that exist."""
    position = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    if IS_GROUPED:
        row = tl.load(row_ids + position)
        return tl.load(expert_ids + pm), row, row >= 0
    return 0, position, position < M


@triton.jit
def grouped_matmul_kernel(
    x, expert_ids, row_ids, row_scales, layer_index, packed, scales, offsets, out,
    M: tl.constexpr, HAS_ROW_SCALES: tl.constexpr, EXPERTS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_GROUPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``out[row] = row_scales[row] * (x[row] @ w[layer, expert].T)``; grid (blocks of rows, blocks of outputs)."""
    K: tl.constexpr = WEIGHT.inputs
    N: tl.constexpr = WEIGHT.outputs
    pm, pn = tl.program_id(0), tl.program_id(1)
    expert, row, row_mask = load_block_rows(expert_ids, row_ids, pm, M, BLOCK_M, IS_GROUPED)
    if expert >= 0:
        weight = TilePointers(packed, scales, offsets)
        n = tl.arange(0, BLOCK_N)
        tile, tile_output = tile_and_output(pn, n, BLOCK_N)
        tile = (tl.load(layer_index).to(tl.int64) * EXPERTS + expert) * WEIGHT.num_tiles + tile
        size: tl.constexpr = WEIGHT.qvalues_per_word * 16
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(WEIGHT.num_chunks):
            k = c * size + tl.arange(0, size)
            mask = row_mask[:, None] & (k < K)[None, :] if K % size else row_mask[:, None]
            xs = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0).to(DTYPE)
            ws = load_weights(weight, WEIGHT, tile, tile_output, c, BLOCK_N, DTYPE)
            acc = dot_accumulate(xs, ws, acc, DTYPE)
        acc = apply_output_scales(acc, weight, WEIGHT, tile, tile_output)
        if HAS_ROW_SCALES:
            acc = acc * tl.load(row_scales + row, mask=row_mask, other=0.0)[:, None]
        output = pn * BLOCK_N + n
        target = out + row.to(tl.int64)[:, None] * N + output[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & (output < N)[None, :])


@triton.jit
def gated_linear_unit_kernel(
    x, expert_ids, row_ids, layer_index, gate_packed, gate_scales, gate_offsets, up_packed, up_scales, up_offsets, out,
    M: tl.constexpr, OUTPUTS_PER_ROW: tl.constexpr, EXPERTS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_GROUPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``out = silu(x @ gate.T) * (x @ up.T)``; grid (blocks of rows, blocks of outputs).

    OUTPUTS_PER_ROW consecutive rows of the result are computed from one row of x.
    """
    K: tl.constexpr = WEIGHT.inputs
    N: tl.constexpr = WEIGHT.outputs
    pm, pn = tl.program_id(0), tl.program_id(1)
    expert, row, row_mask = load_block_rows(expert_ids, row_ids, pm, M, BLOCK_M, IS_GROUPED)
    if expert >= 0:
        gate = TilePointers(gate_packed, gate_scales, gate_offsets)
        up = TilePointers(up_packed, up_scales, up_offsets)
        n = tl.arange(0, BLOCK_N)
        tile, tile_output = tile_and_output(pn, n, BLOCK_N)
        tile = (tl.load(layer_index).to(tl.int64) * EXPERTS + expert) * WEIGHT.num_tiles + tile
        size: tl.constexpr = WEIGHT.qvalues_per_word * 16
        gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_rows = x + (row // OUTPUTS_PER_ROW).to(tl.int64)[:, None] * K
        for c in range(WEIGHT.num_chunks):
            k = c * size + tl.arange(0, size)
            mask = row_mask[:, None] & (k < K)[None, :] if K % size else row_mask[:, None]
            xs = tl.load(x_rows + k[None, :], mask=mask, other=0.0).to(DTYPE)
            ws = load_weights(gate, WEIGHT, tile, tile_output, c, BLOCK_N, DTYPE)
            gate_acc = dot_accumulate(xs, ws, gate_acc, DTYPE)
            ws = load_weights(up, WEIGHT, tile, tile_output, c, BLOCK_N, DTYPE)
            up_acc = dot_accumulate(xs, ws, up_acc, DTYPE)
        gate_acc = apply_output_scales(gate_acc, gate, WEIGHT, tile, tile_output)
        up_acc = apply_output_scales(up_acc, up, WEIGHT, tile, tile_output)
        value = gate_acc / (1.0 + tl.exp(-gate_acc)) * up_acc
        output = pn * BLOCK_N + n
        target = out + row.to(tl.int64)[:, None] * N + output[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=row_mask[:, None] & (output < N)[None, :])
