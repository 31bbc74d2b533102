"""The grouped operations: block sizes, checks and the launches."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _device, tuned
from pallas_kernels._implementation import Implementation, select_implementation
from pallas_kernels._kernel import Constant
from pallas_kernels._kernel_args import array_or, compute_dtype, tile_operands
from pallas_kernels._launch import CompileOptions, KernelModule, LaunchError, launch
from pallas_kernels.grouped_matmul.config import (
    GroupedMatmulConfig,
    choose_block_m,
    gated_linear_unit_heuristic,
    grouped_matmul_heuristic,
)
from pallas_kernels.grouped_matmul.reference import gated_linear_unit_ref, grouped_matmul_ref
from pallas_kernels.grouped_matmul.types import RowBlocks
from pallas_kernels.tiles import Tiles, has_same_layout

kernels = KernelModule("pallas_kernels.grouped_matmul.triton")
_MIN_SHARED_MEMORY = 101_376


def grouped_matmul(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    row_scales: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    config: GroupedMatmulConfig | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``row_scales * (x @ weight[layer].T)`` for many rows, or with a matrix for each block of rows.

    The kernel rounds weights, scales included, to the dtype of x before it multiplies them.

    Args:
        x: ``[M, K]``.
        weight: ``[L, N, K]``; ``[L, E, N, K]`` with ``blocks``.
        layer_index: ``int32 [1]``, index of the layer.
        blocks: Rows of each of the E matrices. Rows in no block are undefined in the result.
        row_scales: ``float32 [M]``, multiplied into the rows of the result.
        dtype: Dtype of the result; that of x by default.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        ``[M, N]``.

    Raises:
        LaunchError: If the shapes do not match.
        NotImplementedError: If the named implementation cannot run.
    """
    _check_shapes(x, weight, blocks)
    dtype = jnp.dtype(dtype or x.dtype)
    if select_implementation(implementation) == "reference":
        return grouped_matmul_ref(x, weight, layer_index, blocks=blocks, row_scales=row_scales, dtype=dtype)
    plan = _plan_blocks("matmul", x.shape[0], weight, blocks, config, layer_index)
    results = launch(
        kernels.grouped_matmul_kernel,
        {
            "x": x,
            "expert_ids": plan.expert_ids,
            "row_ids": plan.row_ids,
            "row_scales": array_or(row_scales, layer_index),
            "layer_index": layer_index,
            **tile_operands(weight),
        },
        {"out": jax.ShapeDtypeStruct((x.shape[0], weight.outputs), dtype)},
        {"M": x.shape[0], "HAS_ROW_SCALES": row_scales is not None, **_kernel_constants(x, weight, blocks, plan)},
        grid=(plan.num_blocks, math.ceil(weight.outputs / plan.config.block_n)),
        options=plan.options,
    )
    return results["out"]


def gated_linear_unit(
    x: jax.Array,
    gate: Tiles,
    up: Tiles,
    layer_index: jax.Array,
    *,
    blocks: RowBlocks | None = None,
    outputs_per_row: int = 1,
    config: GroupedMatmulConfig | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``silu(x @ gate[layer].T) * (x @ up[layer].T)`` for many rows, or with matrices for each block of rows.

    Args:
        x: ``[M, K]``.
        gate: ``[L, N, K]``; ``[L, E, N, K]`` with ``blocks``.
        up: Like ``gate``; the kernel needs the same layout.
        layer_index: ``int32 [1]``, index of the layer.
        blocks: Rows of the result of each of the E matrices; see :func:`grouped_matmul`.
        outputs_per_row: Consecutive rows of the result that are computed from each row of x.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        ``[M * outputs_per_row, N]`` in the dtype of x.

    Raises:
        LaunchError: If the shapes do not match.
        NotImplementedError: If the named implementation cannot run.
    """
    _check_shapes(x, gate, blocks)
    m = x.shape[0] * outputs_per_row
    reason = None if has_same_layout(gate, up) else "gate and up must be stored in the same way"
    if select_implementation(implementation, reason) == "reference":
        return gated_linear_unit_ref(x, gate, up, layer_index, blocks=blocks, outputs_per_row=outputs_per_row)
    plan = _plan_blocks("gated", m, gate, blocks, config, layer_index)
    results = launch(
        kernels.gated_linear_unit_kernel,
        {
            "x": x,
            "expert_ids": plan.expert_ids,
            "row_ids": plan.row_ids,
            "layer_index": layer_index,
            **tile_operands(gate, "gate"),
            **tile_operands(up, "up"),
        },
        {"out": jax.ShapeDtypeStruct((m, gate.outputs), x.dtype)},
        {"M": m, "OUTPUTS_PER_ROW": outputs_per_row, **_kernel_constants(x, gate, blocks, plan)},
        grid=(plan.num_blocks, math.ceil(gate.outputs / plan.config.block_n)),
        options=plan.options,
    )
    return results["out"]


def _check_shapes(x: jax.Array, weight: Tiles, blocks: RowBlocks | None) -> None:
    if x.ndim != 2 or x.shape[1] != weight.inputs:
        raise LaunchError(f"rows {list(x.shape)} do not fit a matrix of {weight.inputs} inputs")
    if len(weight.stack) != (1 if blocks is None else 2):
        raise LaunchError(f"a stack {list(weight.stack)} of matrices; [layers] are needed, [layers, experts] in blocks")


def grouped_matmul_tuning_key(op: str, block_m: int, weight: Tiles) -> tuned.TuningKey[GroupedMatmulConfig]:
    """Returns the sizes that the block sizes of the grouped operations depend on.

    Args:
        op: "matmul" for :func:`grouped_matmul`, "gated" for :func:`gated_linear_unit`.
        block_m: Rows of a block.
        weight: The matrix, or one of the two.
    """
    target = _device.current_target()
    shared_memory = target.shared_memory if target else _MIN_SHARED_MEMORY
    heuristic = (
        gated_linear_unit_heuristic(block_m, shared_memory)
        if op == "gated"
        else grouped_matmul_heuristic(block_m, weight.num_tiles, shared_memory)
    )
    block_ns = (32, 64) if weight.num_tiles % 2 else (32, 64, 128)
    space = {"block_n": block_ns, "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    key = f"m{block_m} n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
    return tuned.TuningKey(op, key, heuristic, space)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _BlockPlan:
    """Blocks of rows of a launch. Without experts they are consecutive rows, and the arrays are placeholders."""

    config: GroupedMatmulConfig
    expert_ids: jax.Array
    row_ids: jax.Array
    num_blocks: int

    @property
    def options(self) -> CompileOptions:
        return CompileOptions(num_warps=self.config.num_warps, num_stages=self.config.num_stages)


def _plan_blocks(
    op: str,
    rows: int,
    weight: Tiles,
    blocks: RowBlocks | None,
    config: GroupedMatmulConfig | None,
    placeholder: jax.Array,
) -> _BlockPlan:
    block_m = blocks.row_ids.shape[1] if blocks else choose_block_m(rows, 1)
    config = config or tuned.lookup_config(grouped_matmul_tuning_key(op, block_m, weight))
    if blocks is None:
        num_blocks = math.ceil(rows / config.block_m)
        return _BlockPlan(config=config, expert_ids=placeholder, row_ids=placeholder, num_blocks=num_blocks)
    if config.block_m != block_m:
        raise LaunchError(f"blocks of {block_m} rows, and programs of {config.block_m}")
    num_blocks = blocks.expert_ids.shape[0]
    return _BlockPlan(config=config, expert_ids=blocks.expert_ids, row_ids=blocks.row_ids, num_blocks=num_blocks)


def _kernel_constants(x: jax.Array, weight: Tiles, blocks: RowBlocks | None, plan: _BlockPlan) -> dict[str, Constant]:
    return {
        "EXPERTS": 1 if blocks is None else weight.stack[1],
        "WEIGHT": weight.layout,
        "BLOCK_M": plan.config.block_m,
        "BLOCK_N": plan.config.block_n,
        "IS_GROUPED": blocks is not None,
        "DTYPE": compute_dtype(x.dtype),
    }
