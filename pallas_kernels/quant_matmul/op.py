"""The operation: which block sizes, and the launch."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import LaunchError, Shape, check_counters, interpreted, launch
from pallas_kernels.quant_matmul.config import LinearShape, linear_shape
from pallas_kernels.tiles import ROWS, Tiles, chunk


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["first", "count"])
@dataclasses.dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares of rows by blocks of columns, which the kernel that made the rows has left behind.

    With them a norm costs its reader nothing: the factor ``1 / rms`` is known at once, and a product can be multiplied
    by it when it is done.

    Attributes:
        parts: float32 ``[M, blocks]``.
        first: block that the columns in question begin with.
        count: how many of them.
    """

    parts: jax.Array
    first: int
    count: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """What a product leaves.

    Attributes:
        out: ``[M, N]``.
        scaled: ``[M, N]``, the same times the next norm's weight (the norm's factor is still missing); ``out`` itself
            where there is no norm.
        squares: of ``out``.
    """

    out: jax.Array
    scaled: jax.Array
    squares: Squares


def linear(
    x: jax.Array,
    weight: Tiles,
    place: jax.Array,
    counters: jax.Array,
    *,
    other: Tiles | None = None,
    squares: Squares | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    next_norm: jax.Array | None = None,
    next_from: int = 0,
    dtype: Any = None,
    scaled_dtype: Any = None,
    shape: LinearShape | None = None,
) -> tuple[Made, jax.Array]:
    """``factor(x) * (x @ weight[layer].T) + residual`` for few rows.

    Args:
        x: ``[M, K]``, or wider: of more columns the first K are taken. Where ``squares`` are given, x is already
            multiplied by its norm's weight, and the squares are those from before.
        weight: ``[L, N, K]``.
        place: int32 ``[1]``, index of the matrix in its stack.
        counters: int32 zeros, one for each block of outputs and rows or more; without splits they are not looked at.
        other: ``[L, N', K]`` of the same kind; its outputs follow those of ``weight``, whose number the block of
            outputs must divide.
        squares: of x, for a norm.
        eps: of the norm.
        residual: ``[M, N]``.
        next_norm: ``[norms, N]``, weights of the norm that reads the result.
        next_from: what to add to ``place`` for the index of the norm.
        dtype: of the result; that of x unless given.
        scaled_dtype: of the result times the next norm's weight; that of x unless given.
        shape: block sizes; chosen for the card unless given.

    Returns:
        The result, and the counters, zero again.

    Raises:
        LaunchError: for matrices that do not belong together, and for too few columns or counters.
    """
    if other is not None and (other.kind, other.inputs) != (weight.kind, weight.inputs):
        raise LaunchError("two matrices side by side must have codes of one kind, and the same inputs")
    (m, stride), first = x.shape, weight.outputs
    outputs = first + (other.outputs if other else 0)
    shape = shape or tuned.best(problem(m, outputs, weight))
    blocks = math.ceil(outputs / shape.block_n)
    if stride < weight.inputs:
        raise LaunchError(f"rows of {stride} columns for a matrix of {weight.inputs} inputs")
    if other is not None and first % shape.block_n:
        raise LaunchError(f"a second matrix cannot begin at output {first} with blocks of {shape.block_n}")
    if shape.splits > 1:
        check_counters(counters, math.ceil(m / shape.block_m) * blocks)
    from pallas_kernels.quant_matmul.triton import linear_kernel

    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    out, scaled, parts, _, counters = launch(
        linear_kernel,
        [
            x,
            x if squares is None else squares.parts,
            place,
            *operands(weight),
            *operands(other or weight),
            x if residual is None else residual,
            x if next_norm is None else next_norm,
            counters,
        ],
        [
            jax.ShapeDtypeStruct((m, outputs), jnp.dtype(dtype or x.dtype)),
            one if next_norm is None else jax.ShapeDtypeStruct((m, outputs), jnp.dtype(scaled_dtype or x.dtype)),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            jax.ShapeDtypeStruct((shape.splits, m, outputs), jnp.float32) if shape.splits > 1 else one,
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ],
        grid=(math.ceil(m / shape.block_m), shape.splits, blocks),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        aliases={11: 4},
        M=m,
        N=outputs,
        STRIDE=stride,
        **constants(weight),
        OTHER=first,
        **{f"O_{name}": value for name, value in constants(other or weight).items() if name in _OWN},
        BM=shape.block_m,
        BN=shape.block_n,
        SPLITS=shape.splits,
        FACTOR=squares is not None,
        FIRST=squares.first if squares else 0,
        PARTS=squares.count if squares else 1,
        ALL_PARTS=squares.parts.shape[1] if squares else 1,
        EPS=eps,
        RESIDUAL=residual is not None,
        NEXT=next_norm is not None,
        NEXT_FROM=next_from,
        DT=compute_dtype(x.dtype),
    )
    return Made(out, out if next_norm is None else scaled, Squares(parts, 0, blocks)), counters


def problem(rows: int, outputs: int, weight: Tiles) -> tuned.Problem[LinearShape]:
    """What block sizes of :func:`linear` depend on.

    Args:
        rows: of the activations.
        outputs: of the matrix, or of both.
        weight: the first.
    """
    target = _device.target()
    rule = linear_shape(rows, outputs, weight.chunks, target.multiprocessors if target else 128)
    key = f"{tuned.rows_key(rows)} n{outputs} k{weight.inputs} {weight.kind} g{weight.group}"
    splits = tuple(n for n in (1, 2, 4, 8, 16) if n <= weight.chunks)
    axes = {"block_n": (32, 64), "splits": splits, "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.Problem("linear", key, rule, axes if rows <= 16 else {"block_m": (16, 32, 64), **axes})


_OWN = ("TILES", "GROUPS", "GROUP", "SUB", "SCALED", "OFFSET")


def operands(weight: Tiles) -> list[jax.Array]:
    """The arrays of a weight as a kernel takes them; what is not there is not read either."""
    return [weight.words, *(weight.words if x is None else x for x in (weight.scales, weight.offsets))]


def constants(weight: Tiles) -> dict[str, Any]:
    """What a kernel must know of a weight."""
    size = chunk(weight.kind)
    return {
        "K": weight.inputs,
        "TILES": weight.tiles,
        "CHUNKS": weight.chunks,
        "GROUPS": weight.groups,
        "GROUP": weight.group,
        "SUB": math.gcd(weight.group, size) if weight.group else size,
        "PER_WORD": size // ROWS,
        "KIND": weight.kind,
        "SCALED": weight.scales is not None,
        "OFFSET": weight.offsets is not None,
    }


def compute_dtype(dtype: Any) -> Any:
    """The dtype of a kernel's products: bfloat16, or float32 where the activations have it and in the interpreter."""
    import triton.language as tl

    return tl.float32 if interpreted() or jnp.dtype(dtype) == jnp.float32 else tl.bfloat16
