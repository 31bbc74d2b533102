"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import CompileOptions, LaunchError, launch
from pallas_kernels.grouped_matmul.config import (
    GroupedMatmulConfig,
    block_m_heuristic,
    gated_linear_unit_heuristic,
    grouped_matmul_heuristic,
)
from pallas_kernels.quant_matmul.op import compute_dtype, weight_constants, weight_operands
from pallas_kernels.tiles import Tiles, has_same_layout

_MIN_SHARED_MEMORY = 101_376


class RowBlocks(NamedTuple):
    """Rows in blocks of equal height, each of which has a matrix of its own.

    Attributes:
        expert_ids: int32 ``[blocks]``, the matrix of each block; -1 for a block without rows.
        row_ids: int32 ``[blocks, height]``, the rows in it, or -1.
    """

    expert_ids: jax.Array
    row_ids: jax.Array


choose_block_m = block_m_heuristic


def grouped_matmul(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    row_scales: jax.Array | None = None,
    dtype: Any = None,
    config: GroupedMatmulConfig | None = None,
) -> jax.Array:
    """``row_scales * (x @ weight[layer].T)`` for many rows, or with a matrix for each block of them.

    Weights are rounded to the dtype of x before they are multiplied, scales included.

    Args:
        x: ``[M, K]``.
        weight: ``[L, N, K]``; ``[L, E, N, K]`` with ``blocks``.
        layer_index: int32 ``[1]``, index of the layer.
        blocks: which row has which of the E matrices; rows that are in no block are undefined in the result.
        row_scales: float32 ``[M]``, of the rows of the result.
        dtype: of the result; that of x unless given.
        config: block sizes; chosen for the card unless given.

    Returns:
        ``[M, N]``.

    Raises:
        LaunchError: if the shapes do not fit together.
    """
    _check_shapes(x, weight, blocks)
    m = x.shape[0]
    from pallas_kernels.grouped_matmul.triton import grouped_matmul_kernel

    config, arrays, count = _resolve_blocks("matmul", m, weight, blocks, config, layer_index)
    (out,) = launch(
        grouped_matmul_kernel,
        [x, *arrays, layer_index if row_scales is None else row_scales, layer_index, *weight_operands(weight)],
        [jax.ShapeDtypeStruct((m, weight.outputs), jnp.dtype(dtype or x.dtype))],
        grid=(count, math.ceil(weight.outputs / config.block_n)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        M=m,
        FACTORS=row_scales is not None,
        **_kernel_constants(x, weight, blocks, config),
    )
    return out


def gated_linear_unit(
    x: jax.Array,
    gate: Tiles,
    up: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    outputs_per_row: int = 1,
    config: GroupedMatmulConfig | None = None,
) -> jax.Array:
    """``silu(x @ gate[layer].T) * (x @ up[layer].T)`` for many rows, or with matrices for each block of them.

    Args:
        x: ``[M, K]``.
        gate: ``[L, N, K]``; ``[L, E, N, K]`` with ``blocks``. So is ``up``, in the same storage.
        up: see ``gate``.
        layer_index: int32 ``[1]``, index of the layer.
        blocks: of the rows of the result; see :func:`grouped_matmul`.
        outputs_per_row: rows of the result that are made of each row of x, one after the other.
        config: block sizes; chosen for the card unless given.

    Returns:
        ``[M * chosen, N]`` in the dtype of x.

    Raises:
        LaunchError: if the shapes do not fit together.
    """
    if not has_same_layout(gate, up):
        raise LaunchError("gate and up must be stored in the same way")
    _check_shapes(x, gate, blocks)
    m = x.shape[0] * outputs_per_row
    from pallas_kernels.grouped_matmul.triton import gated_linear_unit_kernel

    config, arrays, count = _resolve_blocks("gated", m, gate, blocks, config, layer_index)
    (out,) = launch(
        gated_linear_unit_kernel,
        [x, *arrays, layer_index, *weight_operands(gate), *weight_operands(up)],
        [jax.ShapeDtypeStruct((m, gate.outputs), x.dtype)],
        grid=(count, math.ceil(gate.outputs / config.block_n)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        M=m,
        PER_ROW=outputs_per_row,
        **_kernel_constants(x, gate, blocks, config),
    )
    return out


def _check_shapes(x: jax.Array, weight: Tiles, blocks: RowBlocks | None) -> None:
    if x.ndim != 2 or x.shape[1] != weight.inputs:
        raise LaunchError(f"rows {list(x.shape)} do not fit a matrix of {weight.inputs} inputs")
    if len(weight.stack) != (1 if blocks is None else 2):
        raise LaunchError(f"a stack {list(weight.stack)} of matrices; [layers] are needed, [layers, experts] in blocks")


def grouped_matmul_tuning_key(op: str, block_m: int, weight: Tiles) -> tuned.TuningKey[GroupedMatmulConfig]:
    """What block sizes of :func:`grouped_matmul` and :func:`gated_linear_unit` depend on.

    Args:
        op: which of the two.
        block_m: rows of a block.
        weight: the matrix, or one of both.
    """
    target = _device.current_target()
    memory = target.shared_memory if target else _MIN_SHARED_MEMORY
    rule = (
        gated_linear_unit_heuristic(block_m, memory)
        if op == "gated"
        else grouped_matmul_heuristic(block_m, weight.num_tiles, memory)
    )
    wide = (32, 64) if weight.num_tiles % 2 else (32, 64, 128)
    axes = {"block_n": wide, "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    key = f"m{block_m} n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
    return tuned.TuningKey(op, key, rule, axes)


def _resolve_blocks(
    op: str,
    rows: int,
    weight: Tiles,
    blocks: RowBlocks | None,
    config: GroupedMatmulConfig | None,
    layer_index: jax.Array,
) -> tuple[GroupedMatmulConfig, list[jax.Array], int]:
    """Block sizes, the arrays of the blocks, and how many there are."""
    block_m = blocks.row_ids.shape[1] if blocks else block_m_heuristic(rows, 1)
    cut = config or tuned.lookup_config(grouped_matmul_tuning_key(op, block_m, weight))
    if blocks is None:
        return cut, [layer_index, layer_index], math.ceil(rows / cut.block_m)
    if cut.block_m != block_m:
        raise LaunchError(f"blocks of {block_m} rows, and programs of {cut.block_m}")
    return cut, [blocks.expert_ids, blocks.row_ids], blocks.expert_ids.shape[0]


def _kernel_constants(
    x: jax.Array, weight: Tiles, blocks: RowBlocks | None, config: GroupedMatmulConfig
) -> dict[str, Any]:
    known = weight_constants(weight)
    del known["SUB"]
    return {
        **known,
        "N": weight.outputs,
        "EXPERTS": 1 if blocks is None else weight.stack[1],
        "BM": config.block_m,
        "BN": config.block_n,
        "GROUPED": blocks is not None,
        "DT": compute_dtype(x.dtype),
    }
