"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import LaunchError, Shape, launch
from pallas_kernels.grouped_matmul.config import RowsShape, block_height, gated_shape, matmul_shape
from pallas_kernels.quant_matmul.op import compute_dtype, constants, operands
from pallas_kernels.tiles import Tiles, same_layout

_LEAST_SHARED_MEMORY = 101_376


class Blocks(NamedTuple):
    """Rows in blocks of equal height, each of which has a matrix of its own.

    Attributes:
        owners: int32 ``[blocks]``, the matrix of each block; -1 for a block without rows.
        rows: int32 ``[blocks, height]``, the rows in it, or -1.
    """

    owners: jax.Array
    rows: jax.Array


height = block_height


def matmul(
    x: jax.Array,
    weight: Tiles,
    place: jax.Array,
    *,
    blocks: Blocks | None = None,
    factors: jax.Array | None = None,
    dtype: Any = None,
    shape: RowsShape | None = None,
) -> jax.Array:
    """``factors * (x @ weight[layer].T)`` for many rows, or with a matrix for each block of them.

    Weights are rounded to the dtype of x before they are multiplied, scales included.

    Args:
        x: ``[M, K]``.
        weight: ``[L, N, K]``; ``[L, E, N, K]`` with ``blocks``.
        place: int32 ``[1]``, index of the layer.
        blocks: which row has which of the E matrices; rows that are in no block are undefined in the result.
        factors: float32 ``[M]``, of the rows of the result.
        dtype: of the result; that of x unless given.
        shape: block sizes; chosen for the card unless given.

    Returns:
        ``[M, N]``.

    Raises:
        LaunchError: if the shapes do not fit together.
    """
    _check(x, weight, blocks)
    m = x.shape[0]
    from pallas_kernels.grouped_matmul.triton import matmul_kernel

    shape, arrays, count = _laid_out("matmul", m, weight, blocks, shape, place)
    (out,) = launch(
        matmul_kernel,
        [x, *arrays, place if factors is None else factors, place, *operands(weight)],
        [jax.ShapeDtypeStruct((m, weight.outputs), jnp.dtype(dtype or x.dtype))],
        grid=(count, math.ceil(weight.outputs / shape.block_n)),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        M=m,
        FACTORS=factors is not None,
        **_constants(x, weight, blocks, shape),
    )
    return out


def gated(
    x: jax.Array,
    gate: Tiles,
    up: Tiles,
    place: jax.Array,
    *,
    blocks: Blocks | None = None,
    chosen: int = 1,
    shape: RowsShape | None = None,
) -> jax.Array:
    """``silu(x @ gate[layer].T) * (x @ up[layer].T)`` for many rows, or with matrices for each block of them.

    Args:
        x: ``[M, K]``.
        gate: ``[L, N, K]``; ``[L, E, N, K]`` with ``blocks``. So is ``up``, in the same storage.
        up: see ``gate``.
        place: int32 ``[1]``, index of the layer.
        blocks: of the rows of the result; see :func:`matmul`.
        chosen: rows of the result that are made of each row of x, one after the other.
        shape: block sizes; chosen for the card unless given.

    Returns:
        ``[M * chosen, N]`` in the dtype of x.

    Raises:
        LaunchError: if the shapes do not fit together.
    """
    if not same_layout(gate, up):
        raise LaunchError("gate and up must be stored in the same way")
    _check(x, gate, blocks)
    m = x.shape[0] * chosen
    from pallas_kernels.grouped_matmul.triton import gated_kernel

    shape, arrays, count = _laid_out("gated", m, gate, blocks, shape, place)
    (out,) = launch(
        gated_kernel,
        [x, *arrays, place, *operands(gate), *operands(up)],
        [jax.ShapeDtypeStruct((m, gate.outputs), x.dtype)],
        grid=(count, math.ceil(gate.outputs / shape.block_n)),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        M=m,
        PER_ROW=chosen,
        **_constants(x, gate, blocks, shape),
    )
    return out


def _check(x: jax.Array, weight: Tiles, blocks: Blocks | None) -> None:
    if x.ndim != 2 or x.shape[1] != weight.inputs:
        raise LaunchError(f"rows {list(x.shape)} do not fit a matrix of {weight.inputs} inputs")
    if len(weight.stack) != (1 if blocks is None else 2):
        raise LaunchError(f"a stack {list(weight.stack)} of matrices; [layers] are needed, [layers, experts] in blocks")


def problem(op: str, block_m: int, weight: Tiles) -> tuned.Problem[RowsShape]:
    """What block sizes of :func:`matmul` and :func:`gated` depend on.

    Args:
        op: which of the two.
        block_m: rows of a block.
        weight: the matrix, or one of both.
    """
    target = _device.target()
    memory = target.shared_memory if target else _LEAST_SHARED_MEMORY
    rule = gated_shape(block_m, memory) if op == "gated" else matmul_shape(block_m, weight.tiles, memory)
    wide = (32, 64) if weight.tiles % 2 else (32, 64, 128)
    axes = {"block_n": wide, "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    key = f"m{block_m} n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group}"
    return tuned.Problem(op, key, rule, axes)


def _laid_out(
    op: str, rows: int, weight: Tiles, blocks: Blocks | None, shape: RowsShape | None, place: jax.Array
) -> tuple[RowsShape, list[jax.Array], int]:
    """Block sizes, the arrays of the blocks, and how many there are."""
    block_m = blocks.rows.shape[1] if blocks else block_height(rows, 1)
    cut = shape or tuned.best(problem(op, block_m, weight))
    if blocks is None:
        return cut, [place, place], math.ceil(rows / cut.block_m)
    if cut.block_m != block_m:
        raise LaunchError(f"blocks of {block_m} rows, and programs of {cut.block_m}")
    return cut, [blocks.owners, blocks.rows], blocks.owners.shape[0]


def _constants(x: jax.Array, weight: Tiles, blocks: Blocks | None, shape: RowsShape) -> dict[str, Any]:
    known = constants(weight)
    del known["SUB"]
    return {
        **known,
        "N": weight.outputs,
        "EXPERTS": 1 if blocks is None else weight.stack[1],
        "BM": shape.block_m,
        "BN": shape.block_n,
        "GROUPED": blocks is not None,
        "DT": compute_dtype(x.dtype),
    }
