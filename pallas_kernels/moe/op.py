"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels._launch import LaunchError, Shape, check_counters, launch
from pallas_kernels.moe.config import PairShape
from pallas_kernels.quant_matmul.op import Made, Squares, compute_dtype, constants, operands
from pallas_kernels.tiles import Tiles, same_layout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """How experts are chosen.

    Attributes:
        experts: how many there are.
        chosen: how many a token is given; 0 for a feed-forward without any, which is then the shared expert alone.
        normalised: whether their weights are made to sum to one.
        factor: that the weights are then multiplied by.
    """

    experts: int
    chosen: int
    normalised: bool
    factor: float

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {"E": self.experts, "X": self.chosen, "NORMALISED": self.normalised, "FACTOR": self.factor}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["owners", "weights", "sizes", "pairs"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The (token, expert) pairs in blocks of one expert each; pair ``m * X + i`` is token m with its i-th expert.

    Attributes:
        owners: int32 ``[blocks]``, the expert of each block.
        weights: float32 ``[M * X]``, of the pairs.
        sizes: int32 ``[blocks]``, how many pairs a block has; None where every pair is a block.
        pairs: int32 ``[blocks, 16]``, which; None likewise.
    """

    owners: jax.Array
    weights: jax.Array
    sizes: jax.Array | None = None
    pairs: jax.Array | None = None


def sort_pairs(routed: Routed, place: jax.Array, logits: jax.Array, bias: jax.Array) -> Plan:
    """Chooses experts and sorts the pairs by them, for some tens of tokens.

    Args:
        routed: how experts are chosen.
        place: int32 ``[1]``, index of the layer.
        logits: float32 ``[M, E]``.
        bias: float32 ``[L, E]``, which takes part in the choice only.
    """
    m, height = logits.shape[0], PairShape().block_m
    pairs = m * routed.chosen
    blocks = min(pairs, routed.experts + pairs // height)
    from pallas_kernels.moe.triton import plan_kernel

    number = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    owners, sizes, table, weights = launch(
        plan_kernel,
        [logits, bias, place],
        [
            number,
            number,
            jax.ShapeDtypeStruct((blocks, height), jnp.int32),
            jax.ShapeDtypeStruct((pairs,), jnp.float32),
        ],
        grid=(1,),
        shape=Shape(num_warps=4 if m <= 64 else 16),
        M=m,
        **routed.constants,
        BLOCKS=blocks,
        BM=height,
    )
    return Plan(owners, weights, sizes, table)


def gate_up(
    routed: Routed,
    x: jax.Array,
    squares: Squares,
    place: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    gate: Tiles,
    up: Tiles,
    shared: tuple[Tiles, Tiles] | None,
    *,
    eps: float,
    plan: Plan | None = None,
    shape: PairShape | None = None,
) -> tuple[jax.Array, Plan]:
    """The products ``silu(gate(norm(x))) * up(norm(x))`` of the chosen experts and the shared one.

    Args:
        routed: how experts are chosen.
        x: ``[M, D]``, multiplied by its norm's weight.
        squares: of x before that.
        place: int32 ``[1]``, index of the layer.
        logits: float32 ``[M, E]``.
        bias: float32 ``[L, E]``, which takes part in the choice only.
        gate: ``[L, E, F, D]``; so is ``up``, in the same storage.
        up: see ``gate``.
        shared: gate and up of the shared expert, ``[L, F, D]``, or None.
        eps: of the norm.
        plan: from :func:`sort_pairs`; without it each pair is a block of its own.
        shape: block sizes; chosen for the card unless given.

    Returns:
        ``[M * X * F + M * F']``: rows of the pairs, then of the shared expert; and the plan that was followed.
    """
    if x.shape[1] != gate.inputs:
        raise LaunchError(f"rows of {x.shape[1]} columns for experts of {gate.inputs} inputs")
    for one, two in ((gate, up), shared or (gate, up)):
        if not same_layout(one, two):
            raise LaunchError("gate and up must be stored in the same way")
    m, width = x.shape[0], gate.shape[-2]
    shape = shape or tuned.best(problem("gate_up", routed, m, gate, shared[0] if shared else None))
    other = shared or (gate, up)
    shared_width = shared[0].shape[-2] if shared else 0
    from pallas_kernels.moe.triton import gate_up_kernel

    pairs = m * routed.chosen
    blocks = pairs if plan is None else plan.owners.shape[0]
    _check_height(plan, shape)
    left = 1 if plan else max(pairs, 1)
    out, owners, weights = launch(
        gate_up_kernel,
        [
            x,
            squares.parts,
            place,
            logits,
            bias,
            *([place] * 3 if plan is None else [plan.owners, *_table(plan, place)]),
            *operands(gate),
            *operands(up),
            *operands(other[0]),
            *operands(other[1]),
        ],
        [
            jax.ShapeDtypeStruct((pairs * width + m * shared_width,), x.dtype),
            jax.ShapeDtypeStruct((left,), jnp.int32),
            jax.ShapeDtypeStruct((left,), jnp.float32),
        ],
        grid=(math.ceil(max(width, shared_width) / shape.block_n), blocks + _blocks(m, shared, shape)),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        BLOCKS=blocks,
        SORTED=plan is not None,
        M=m,
        **routed.constants,
        EPS=eps,
        PARTS=squares.parts.shape[1],
        BM=shape.block_m,
        BN=shape.block_n,
        F=width,
        **constants(gate),
        SF=shared_width,
        **_shared(other[0]),
        DT=compute_dtype(x.dtype),
    )
    return out, plan or Plan(owners, weights)


def down(
    routed: Routed,
    h: jax.Array,
    plan: Plan,
    place: jax.Array,
    weight: Tiles,
    shared: Tiles | None,
    residual: jax.Array | None,
    next_norm: jax.Array | None,
    counters: jax.Array,
    *,
    next_from: int = 0,
    shape: PairShape | None = None,
) -> tuple[Made, jax.Array]:
    """Adds the weighted outputs of the chosen experts, and of the shared one, to the residual stream.

    Args:
        routed: how experts are chosen.
        h: from :func:`gate_up`.
        plan: from there too.
        place: int32 ``[1]``, index of the layer.
        weight: ``[L, E, D, F]``.
        shared: ``[L, D, F']`` of the shared expert, or None.
        residual: float32 ``[M, D]``; None where the sum over devices is still to come.
        next_norm: ``[norms, D]``, weights of the norm that reads the result; None likewise.
        counters: int32 zeros, one for each block of outputs or more.
        next_from: what to add to ``place`` for the index of the norm.
        shape: block sizes; chosen for the card unless given.

    Returns:
        The residual stream in float32, times the next norm's weight in the dtype of h, and its squares; the counters,
        zero again.
    """
    outputs = weight.outputs
    m = h.size // (routed.chosen * weight.inputs + (shared.inputs if shared else 0))
    shape = shape or tuned.best(problem("down", routed, m, weight, shared))
    _check_height(plan, shape)
    count = m * routed.chosen if plan.pairs is None else plan.owners.shape[0]
    table = _table(plan, place)
    blocks, other = math.ceil(outputs / shape.block_n), shared or weight
    check_counters(counters, blocks)
    from pallas_kernels.moe.triton import down_kernel

    own = constants(weight)
    width, shared_width = own.pop("K"), shared.shape[-1] if shared else 0
    out, scaled, parts, _, counters = launch(
        down_kernel,
        [
            h,
            plan.owners,
            *table,
            plan.weights,
            place,
            *operands(weight),
            *operands(other),
            h if residual is None else residual,
            h if next_norm is None else next_norm,
            counters,
        ],
        [
            jax.ShapeDtypeStruct((m, outputs), jnp.float32),
            jax.ShapeDtypeStruct((1, 1) if next_norm is None else (m, outputs), h.dtype),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            jax.ShapeDtypeStruct((routed.chosen + 1, m, outputs), jnp.float32),
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ],
        grid=(blocks, count + _blocks(m, shared, shape)),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        aliases={14: 4},
        BLOCKS=count,
        SORTED=plan.pairs is not None,
        M=m,
        N=outputs,
        E=routed.experts,
        X=routed.chosen,
        BM=shape.block_m,
        BN=shape.block_n,
        F=width,
        **own,
        SF=shared_width,
        **_shared(other),
        RESIDUAL=residual is not None,
        NEXT=next_norm is not None,
        NEXT_FROM=next_from,
        DT=compute_dtype(h.dtype),
    )
    return Made(out, out if next_norm is None else scaled, Squares(parts, 0, blocks)), counters


def _table(plan: Plan, nothing: jax.Array) -> list[jax.Array]:
    """The arrays of pairs in blocks."""
    return [nothing if x is None else x for x in (plan.sizes, plan.pairs)]


def _check_height(plan: Plan | None, shape: PairShape) -> None:
    if plan is not None and plan.pairs is not None and plan.pairs.shape[1] != shape.block_m:
        raise LaunchError(f"blocks of {plan.pairs.shape[1]} pairs, and programs of {shape.block_m} rows")


def problem(op: str, routed: Routed, rows: int, weight: Tiles, shared: Tiles | None) -> tuned.Problem[PairShape]:
    """What block sizes of :func:`gate_up` and :func:`down` depend on.

    Args:
        op: which of the two.
        routed: how experts are chosen.
        rows: tokens.
        weight: of the experts: gate, or down.
        shared: of the shared expert.
    """
    other = "" if shared is None else f" shared {_sizes(shared)}"
    key = f"{tuned.rows_key(rows)} {_sizes(weight)} e{routed.experts} x{routed.chosen}{other}"
    axes = {"block_n": (32, 64), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.Problem(op, key, PairShape(), axes)  # pairs are sorted into blocks of the one height


def _sizes(weight: Tiles) -> str:
    return f"n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group}"


def _blocks(rows: int, shared: Any, shape: PairShape) -> int:
    """Programs of the shared expert for each block of outputs."""
    return math.ceil(rows / shape.block_m) if shared else 0


def _shared(weight: Tiles) -> dict[str, Any]:
    return {f"S_{name}": value for name, value in constants(weight).items() if name != "K"}
