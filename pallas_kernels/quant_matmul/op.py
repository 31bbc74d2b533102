"""The fused linear operation: block sizes, checks and the launch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _device, tuned
from pallas_kernels._implementation import Implementation, select_implementation
from pallas_kernels._kernel_args import array_or, compute_dtype, tile_operands
from pallas_kernels._launch import CompileOptions, KernelModule, LaunchError, check_counters, launch
from pallas_kernels.quant_matmul.config import LinearConfig, linear_heuristic
from pallas_kernels.quant_matmul.reference import fused_linear_ref
from pallas_kernels.quant_matmul.types import LinearOutput, SumSq, SumSqLayout
from pallas_kernels.tiles import Tiles

kernels = KernelModule("pallas_kernels.quant_matmul.triton")


def fused_linear(
    x: jax.Array,
    weight: Tiles,
    layer_index: jax.Array,
    counters: jax.Array,
    *,
    second_weight: Tiles | None = None,
    sum_sq: SumSq | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    next_norm: jax.Array | None = None,
    next_norm_offset: int = 0,
    dtype: DTypeLike | None = None,
    scaled_dtype: DTypeLike | None = None,
    config: LinearConfig | None = None,
    implementation: Implementation | None = None,
) -> tuple[LinearOutput, jax.Array]:
    """Computes ``inv_rms(x) * (x @ weight[layer].T) + residual`` for few rows.

    Args:
        x: ``[M, K]``, or wider, of which the first K columns are used. With ``sum_sq``, x is already multiplied by the
            weight of its norm, and the sums of squares are those from before.
        weight: ``[L, N, K]``.
        layer_index: ``int32 [1]``, index of the matrix in its stack.
        counters: ``int32`` zeros, at least one for each block of outputs and rows; unused without splits.
        second_weight: ``[L, N', K]``; its outputs follow those of ``weight``.
        sum_sq: Sums of squares of x, if x has a norm.
        eps: Epsilon of that norm.
        residual: ``[M, N]``, added to the product.
        next_norm: ``[norms, N]``, weights of the norm that reads the result.
        next_norm_offset: Added to ``layer_index`` for the index of that norm.
        dtype: Dtype of the result; that of x by default.
        scaled_dtype: Dtype of the result times the weight of the next norm; that of x by default.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`. The kernel needs two weights
            of one kind, of which the first has whole blocks of outputs.

    Returns:
        The result, and the counters, zero again.

    Raises:
        LaunchError: If the shapes do not match or there are too few counters.
        NotImplementedError: If the named implementation cannot run.
    """
    _check_inputs(x, weight, second_weight)
    outputs = weight.outputs + (second_weight.outputs if second_weight else 0)
    config = config or tuned.lookup_config(linear_tuning_key(x.shape[0], outputs, weight))
    dtype, scaled_dtype = jnp.dtype(dtype or x.dtype), jnp.dtype(scaled_dtype or x.dtype)
    if select_implementation(implementation, _unsupported_reason(weight, second_weight, config)) == "reference":
        return fused_linear_ref(
            x,
            weight,
            layer_index,
            counters,
            second_weight=second_weight,
            sum_sq=sum_sq,
            eps=eps,
            residual=residual,
            next_norm=next_norm,
            next_norm_offset=next_norm_offset,
            dtype=dtype,
            scaled_dtype=scaled_dtype,
        )
    rows, (m, stride), blocks = math.ceil(x.shape[0] / config.block_m), x.shape, math.ceil(outputs / config.block_n)
    if config.splits > 1:
        check_counters(counters, rows * blocks)
    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    results = launch(
        kernels.fused_linear_kernel,
        {
            "x": x,
            "sum_sq": x if sum_sq is None else sum_sq.partials,
            "layer_index": layer_index,
            **tile_operands(weight),
            **tile_operands(second_weight or weight, "second"),
            "residual": array_or(residual, x),
            "next_norm": array_or(next_norm, x),
            "counters_in": counters,
        },
        {
            "out": jax.ShapeDtypeStruct((m, outputs), dtype),
            "scaled": unused if next_norm is None else jax.ShapeDtypeStruct((m, outputs), scaled_dtype),
            "out_sum_sq": jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            "partials": jax.ShapeDtypeStruct((config.splits, m, outputs), jnp.float32) if config.splits > 1 else unused,
            "counters": jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        },
        {
            "M": m,
            "N": outputs,
            "STRIDE": stride,
            "WEIGHT": weight.layout,
            "SECOND": (second_weight or weight).layout,
            "NORM": sum_sq.layout(eps) if sum_sq else SumSqLayout(),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SPLIT_K": config.splits,
            "HAS_RESIDUAL": residual is not None,
            "HAS_NEXT_NORM": next_norm is not None,
            "NEXT_NORM_OFFSET": next_norm_offset,
            "DTYPE": compute_dtype(x.dtype),
        },
        grid=(rows, config.splits, blocks),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={"counters_in": "counters"},
    )
    scaled = results["out"] if next_norm is None else results["scaled"]
    return LinearOutput(results["out"], scaled, SumSq(results["out_sum_sq"], 0, blocks)), results["counters"]


def _check_inputs(x: jax.Array, weight: Tiles, second_weight: Tiles | None) -> None:
    if second_weight is not None and second_weight.inputs != weight.inputs:
        raise LaunchError("two matrices side by side must have the same inputs")
    if x.shape[1] < weight.inputs:
        raise LaunchError(f"rows of {x.shape[1]} columns for a matrix of {weight.inputs} inputs")


def _unsupported_reason(weight: Tiles, second_weight: Tiles | None, config: LinearConfig) -> str | None:
    if second_weight is None:
        return None
    if second_weight.kind != weight.kind:
        return "two matrices side by side must have codes of one kind"
    if weight.outputs % config.block_n:
        return f"a second matrix cannot begin at output {weight.outputs} with blocks of {config.block_n}"
    return None


def linear_tuning_key(rows: int, outputs: int, weight: Tiles) -> tuned.TuningKey[LinearConfig]:
    """Returns the sizes that the block sizes of :func:`fused_linear` depend on.

    Args:
        rows: Rows of the activations.
        outputs: Outputs of the matrix, or of both.
        weight: The first matrix.
    """
    target = _device.current_target()
    heuristic = linear_heuristic(rows, outputs, weight.num_chunks, target.multiprocessors if target else 128)
    key = f"{tuned.rows_bucket(rows)} n{outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
    splits = tuple(n for n in (1, 2, 4, 8, 16) if n <= weight.num_chunks)
    space = {"block_n": (32, 64), "splits": splits, "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.TuningKey("linear", key, heuristic, space if rows <= 16 else {"block_m": (16, 32, 64), **space})
