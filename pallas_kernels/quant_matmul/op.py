"""The operation: which block sizes, and the launch."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import CompileOptions, LaunchError, check_counters, is_interpreted, launch
from pallas_kernels.quant_matmul.config import LinearConfig, linear_heuristic
from pallas_kernels.tiles import CHUNK_ROWS, Tiles, chunk_inputs


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["partials"], meta_fields=["first_block", "num_blocks"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class SumSq:
    """Sums of squares of rows by blocks of columns, which the kernel that made the rows has left behind.

    With them a norm costs its reader nothing: the factor ``1 / rms`` is known at once, and a product can be multiplied
    by it when it is done.

    Attributes:
        partials: float32 ``[M, blocks]``.
        first_block: block that the columns in question begin with.
        num_blocks: how many of them.
    """

    partials: jax.Array
    first_block: int
    num_blocks: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class LinearOutput:
    """What a product leaves.

    Attributes:
        out: ``[M, N]``.
        scaled: ``[M, N]``, the same times the next norm's weight (the norm's factor is still missing); ``out`` itself
            where there is no norm.
        sum_sq: of ``out``.
    """

    out: jax.Array
    scaled: jax.Array
    sum_sq: SumSq


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
    dtype: Any = None,
    scaled_dtype: Any = None,
    config: LinearConfig | None = None,
) -> tuple[LinearOutput, jax.Array]:
    """``factor(x) * (x @ weight[layer].T) + residual`` for few rows.

    Args:
        x: ``[M, K]``, or wider: of more columns the first K are taken. Where ``sum_sq`` are given, x is already
            multiplied by its norm's weight, and the squares are those from before.
        weight: ``[L, N, K]``.
        layer_index: int32 ``[1]``, index of the matrix in its stack.
        counters: int32 zeros, one for each block of outputs and rows or more; without splits they are not looked at.
        second_weight: ``[L, N', K]`` of the same kind; its outputs follow those of ``weight``, whose number the block of
            outputs must divide.
        sum_sq: of x, for a norm.
        eps: of the norm.
        residual: ``[M, N]``.
        next_norm: ``[norms, N]``, weights of the norm that reads the result.
        next_norm_offset: what to add to ``layer_index`` for the index of the norm.
        dtype: of the result; that of x unless given.
        scaled_dtype: of the result times the next norm's weight; that of x unless given.
        config: block sizes; chosen for the card unless given.

    Returns:
        The result, and the counters, zero again.

    Raises:
        LaunchError: for matrices that do not belong together, and for too few columns or counters.
    """
    if second_weight is not None and (second_weight.kind, second_weight.inputs) != (weight.kind, weight.inputs):
        raise LaunchError("two matrices side by side must have codes of one kind, and the same inputs")
    (m, stride), first = x.shape, weight.outputs
    outputs = first + (second_weight.outputs if second_weight else 0)
    config = config or tuned.lookup_config(linear_tuning_key(m, outputs, weight))
    blocks = math.ceil(outputs / config.block_n)
    if stride < weight.inputs:
        raise LaunchError(f"rows of {stride} columns for a matrix of {weight.inputs} inputs")
    if second_weight is not None and first % config.block_n:
        raise LaunchError(f"a second matrix cannot begin at output {first} with blocks of {config.block_n}")
    if config.splits > 1:
        check_counters(counters, math.ceil(m / config.block_m) * blocks)
    from pallas_kernels.quant_matmul.triton import fused_linear_kernel

    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    out, scaled, parts, _, counters = launch(
        fused_linear_kernel,
        [
            x,
            x if sum_sq is None else sum_sq.partials,
            layer_index,
            *weight_operands(weight),
            *weight_operands(second_weight or weight),
            x if residual is None else residual,
            x if next_norm is None else next_norm,
            counters,
        ],
        [
            jax.ShapeDtypeStruct((m, outputs), jnp.dtype(dtype or x.dtype)),
            one if next_norm is None else jax.ShapeDtypeStruct((m, outputs), jnp.dtype(scaled_dtype or x.dtype)),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, m, outputs), jnp.float32) if config.splits > 1 else one,
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ],
        grid=(math.ceil(m / config.block_m), config.splits, blocks),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={11: 4},
        M=m,
        N=outputs,
        STRIDE=stride,
        **weight_constants(weight),
        OTHER=first,
        **{
            f"O_{name}": value
            for name, value in weight_constants(second_weight or weight).items()
            if name in _SECOND_WEIGHT_CONSTANTS
        },
        BM=config.block_m,
        BN=config.block_n,
        SPLITS=config.splits,
        FACTOR=sum_sq is not None,
        FIRST=sum_sq.first_block if sum_sq else 0,
        PARTS=sum_sq.num_blocks if sum_sq else 1,
        ALL_PARTS=sum_sq.partials.shape[1] if sum_sq else 1,
        EPS=eps,
        RESIDUAL=residual is not None,
        NEXT=next_norm is not None,
        NEXT_FROM=next_norm_offset,
        DT=compute_dtype(x.dtype),
    )
    return LinearOutput(out, out if next_norm is None else scaled, SumSq(parts, 0, blocks)), counters


def linear_tuning_key(rows: int, outputs: int, weight: Tiles) -> tuned.TuningKey[LinearConfig]:
    """What block sizes of :func:`fused_linear` depend on.

    Args:
        rows: of the activations.
        outputs: of the matrix, or of both.
        weight: the first.
    """
    target = _device.current_target()
    rule = linear_heuristic(rows, outputs, weight.num_chunks, target.multiprocessors if target else 128)
    key = f"{tuned.rows_bucket(rows)} n{outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
    splits = tuple(n for n in (1, 2, 4, 8, 16) if n <= weight.num_chunks)
    axes = {"block_n": (32, 64), "splits": splits, "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.TuningKey("linear", key, rule, axes if rows <= 16 else {"block_m": (16, 32, 64), **axes})


_SECOND_WEIGHT_CONSTANTS = ("TILES", "GROUPS", "GROUP", "SUB", "SCALED", "OFFSET")


def weight_operands(weight: Tiles) -> list[jax.Array]:
    """The arrays of a weight as a kernel takes them; what is not there is not read either."""
    return [weight.packed, *(weight.packed if x is None else x for x in (weight.scales, weight.offsets))]


def weight_constants(weight: Tiles) -> dict[str, Any]:
    """What a kernel must know of a weight."""
    size = chunk_inputs(weight.kind)
    return {
        "K": weight.inputs,
        "TILES": weight.num_tiles,
        "CHUNKS": weight.num_chunks,
        "GROUPS": weight.num_groups,
        "GROUP": weight.group_size,
        "SUB": math.gcd(weight.group_size, size) if weight.group_size else size,
        "PER_WORD": size // CHUNK_ROWS,
        "KIND": weight.kind,
        "SCALED": weight.scales is not None,
        "OFFSET": weight.offsets is not None,
    }


def compute_dtype(dtype: Any) -> Any:
    """The dtype of a kernel's products: bfloat16, or float32 where the activations have it and in the interpreter."""
    import triton.language as tl

    return tl.float32 if is_interpreted() or jnp.dtype(dtype) == jnp.float32 else tl.bfloat16
