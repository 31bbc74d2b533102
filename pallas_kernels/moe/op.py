"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels._launch import CompileOptions, LaunchError, check_counters, launch
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.quant_matmul.op import LinearOutput, SumSq, compute_dtype, weight_constants, weight_operands
from pallas_kernels.tiles import Tiles, has_same_layout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How experts are chosen.

    Attributes:
        experts: how many there are.
        experts_per_token: how many a token is given; 0 for a feed-forward without any, which is then the shared expert alone.
        normalize_weights: whether their weights are made to sum to one.
        scaling_factor: that the weights are then multiplied by.
    """

    experts: int
    experts_per_token: int
    normalize_weights: bool
    scaling_factor: float

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {
            "E": self.experts,
            "X": self.experts_per_token,
            "NORMALIZED": self.normalize_weights,
            "FACTOR": self.scaling_factor,
        }


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["expert_ids", "weights", "block_sizes", "pair_ids"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Dispatch:
    """The (token, expert) pairs in blocks of one expert each; pair ``m * X + i`` is token m with its i-th expert.

    Attributes:
        expert_ids: int32 ``[blocks]``, the expert of each block.
        weights: float32 ``[M * X]``, of the pairs.
        block_sizes: int32 ``[blocks]``, how many pairs a block has; None where every pair is a block.
        pair_ids: int32 ``[blocks, 16]``, which; None likewise.
    """

    expert_ids: jax.Array
    weights: jax.Array
    block_sizes: jax.Array | None = None
    pair_ids: jax.Array | None = None


def build_dispatch(router: RouterConfig, layer_index: jax.Array, logits: jax.Array, bias: jax.Array) -> Dispatch:
    """Chooses experts and sorts the pairs by them, for some tens of tokens.

    Args:
        router: how experts are chosen.
        layer_index: int32 ``[1]``, index of the layer.
        logits: float32 ``[M, E]``.
        bias: float32 ``[L, E]``, which takes part in the choice only.
    """
    m, height = logits.shape[0], MoeConfig().block_m
    pairs = m * router.experts_per_token
    blocks = min(pairs, router.experts + pairs // height)
    from pallas_kernels.moe.triton import dispatch_kernel

    number = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    owners, sizes, table, weights = launch(
        dispatch_kernel,
        [logits, bias, layer_index],
        [
            number,
            number,
            jax.ShapeDtypeStruct((blocks, height), jnp.int32),
            jax.ShapeDtypeStruct((pairs,), jnp.float32),
        ],
        grid=(1,),
        options=CompileOptions(num_warps=4 if m <= 64 else 16),
        M=m,
        **router.constants,
        BLOCKS=blocks,
        BM=height,
    )
    return Dispatch(owners, weights, sizes, table)


def gate_up(
    router: RouterConfig,
    x: jax.Array,
    sum_sq: SumSq,
    layer_index: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    gate: Tiles,
    up: Tiles,
    shared: tuple[Tiles, Tiles] | None,
    *,
    eps: float,
    dispatch: Dispatch | None = None,
    config: MoeConfig | None = None,
) -> tuple[jax.Array, Dispatch]:
    """The products ``silu(gate(norm(x))) * up(norm(x))`` of the chosen experts and the shared one.

    Args:
        router: how experts are chosen.
        x: ``[M, D]``, multiplied by its norm's weight.
        sum_sq: of x before that.
        layer_index: int32 ``[1]``, index of the layer.
        logits: float32 ``[M, E]``.
        bias: float32 ``[L, E]``, which takes part in the choice only.
        gate: ``[L, E, F, D]``; so is ``up``, in the same storage.
        up: see ``gate``.
        shared: gate and up of the shared expert, ``[L, F, D]``, or None.
        eps: of the norm.
        dispatch: from :func:`build_dispatch`; without it each pair is a block of its own.
        config: block sizes; chosen for the card unless given.

    Returns:
        ``[M * X * F + M * F']``: rows of the pairs, then of the shared expert; and the plan that was followed.
    """
    if x.shape[1] != gate.inputs:
        raise LaunchError(f"rows of {x.shape[1]} columns for experts of {gate.inputs} inputs")
    for one, two in ((gate, up), shared or (gate, up)):
        if not has_same_layout(one, two):
            raise LaunchError("gate and up must be stored in the same way")
    m, width = x.shape[0], gate.shape[-2]
    config = config or tuned.lookup_config(moe_tuning_key("gate_up", router, m, gate, shared[0] if shared else None))
    other = shared or (gate, up)
    shared_width = shared[0].shape[-2] if shared else 0
    from pallas_kernels.moe.triton import gate_up_kernel

    pairs = m * router.experts_per_token
    blocks = pairs if dispatch is None else dispatch.expert_ids.shape[0]
    _check_block_m(dispatch, config)
    left = 1 if dispatch else max(pairs, 1)
    out, owners, weights = launch(
        gate_up_kernel,
        [
            x,
            sum_sq.partials,
            layer_index,
            logits,
            bias,
            *([layer_index] * 3 if dispatch is None else [dispatch.expert_ids, *_pair_operands(dispatch, layer_index)]),
            *weight_operands(gate),
            *weight_operands(up),
            *weight_operands(other[0]),
            *weight_operands(other[1]),
        ],
        [
            jax.ShapeDtypeStruct((pairs * width + m * shared_width,), x.dtype),
            jax.ShapeDtypeStruct((left,), jnp.int32),
            jax.ShapeDtypeStruct((left,), jnp.float32),
        ],
        grid=(math.ceil(max(width, shared_width) / config.block_n), blocks + _num_shared_blocks(m, shared, config)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        BLOCKS=blocks,
        SORTED=dispatch is not None,
        M=m,
        **router.constants,
        EPS=eps,
        PARTS=sum_sq.partials.shape[1],
        BM=config.block_m,
        BN=config.block_n,
        F=width,
        **weight_constants(gate),
        SF=shared_width,
        **_shared_constants(other[0]),
        DT=compute_dtype(x.dtype),
    )
    return out, dispatch or Dispatch(owners, weights)


def down(
    router: RouterConfig,
    h: jax.Array,
    dispatch: Dispatch,
    layer_index: jax.Array,
    weight: Tiles,
    shared: Tiles | None,
    residual: jax.Array | None,
    next_norm: jax.Array | None,
    counters: jax.Array,
    *,
    next_norm_offset: int = 0,
    config: MoeConfig | None = None,
) -> tuple[LinearOutput, jax.Array]:
    """Adds the weighted outputs of the chosen experts, and of the shared one, to the residual stream.

    Args:
        router: how experts are chosen.
        h: from :func:`gate_up`.
        dispatch: from there too.
        layer_index: int32 ``[1]``, index of the layer.
        weight: ``[L, E, D, F]``.
        shared: ``[L, D, F']`` of the shared expert, or None.
        residual: float32 ``[M, D]``; None where the sum over devices is still to come.
        next_norm: ``[norms, D]``, weights of the norm that reads the result; None likewise.
        counters: int32 zeros, one for each block of outputs or more.
        next_norm_offset: what to add to ``layer_index`` for the index of the norm.
        config: block sizes; chosen for the card unless given.

    Returns:
        The residual stream in float32, times the next norm's weight in the dtype of h, and its squares; the counters,
        zero again.
    """
    outputs = weight.outputs
    m = h.size // (router.experts_per_token * weight.inputs + (shared.inputs if shared else 0))
    config = config or tuned.lookup_config(moe_tuning_key("down", router, m, weight, shared))
    _check_block_m(dispatch, config)
    count = m * router.experts_per_token if dispatch.pair_ids is None else dispatch.expert_ids.shape[0]
    table = _pair_operands(dispatch, layer_index)
    blocks, other = math.ceil(outputs / config.block_n), shared or weight
    check_counters(counters, blocks)
    from pallas_kernels.moe.triton import down_kernel

    own = weight_constants(weight)
    width, shared_width = own.pop("K"), shared.shape[-1] if shared else 0
    out, scaled, parts, _, counters = launch(
        down_kernel,
        [
            h,
            dispatch.expert_ids,
            *table,
            dispatch.weights,
            layer_index,
            *weight_operands(weight),
            *weight_operands(other),
            h if residual is None else residual,
            h if next_norm is None else next_norm,
            counters,
        ],
        [
            jax.ShapeDtypeStruct((m, outputs), jnp.float32),
            jax.ShapeDtypeStruct((1, 1) if next_norm is None else (m, outputs), h.dtype),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            jax.ShapeDtypeStruct((router.experts_per_token + 1, m, outputs), jnp.float32),
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ],
        grid=(blocks, count + _num_shared_blocks(m, shared, config)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={14: 4},
        BLOCKS=count,
        SORTED=dispatch.pair_ids is not None,
        M=m,
        N=outputs,
        E=router.experts,
        X=router.experts_per_token,
        BM=config.block_m,
        BN=config.block_n,
        F=width,
        **own,
        SF=shared_width,
        **_shared_constants(other),
        RESIDUAL=residual is not None,
        NEXT=next_norm is not None,
        NEXT_FROM=next_norm_offset,
        DT=compute_dtype(h.dtype),
    )
    return LinearOutput(out, out if next_norm is None else scaled, SumSq(parts, 0, blocks)), counters


def _pair_operands(dispatch: Dispatch, nothing: jax.Array) -> list[jax.Array]:
    """The arrays of pairs in blocks."""
    return [nothing if x is None else x for x in (dispatch.block_sizes, dispatch.pair_ids)]


def _check_block_m(dispatch: Dispatch | None, config: MoeConfig) -> None:
    if dispatch is not None and dispatch.pair_ids is not None and dispatch.pair_ids.shape[1] != config.block_m:
        raise LaunchError(f"blocks of {dispatch.pair_ids.shape[1]} pairs, and programs of {config.block_m} rows")


def moe_tuning_key(
    op: str, router: RouterConfig, rows: int, weight: Tiles, shared: Tiles | None
) -> tuned.TuningKey[MoeConfig]:
    """What block sizes of :func:`gate_up` and :func:`down` depend on.

    Args:
        op: which of the two.
        router: how experts are chosen.
        rows: tokens.
        weight: of the experts: gate, or down.
        shared: of the shared expert.
    """
    other = "" if shared is None else f" shared {_weight_key(shared)}"
    key = f"{tuned.rows_bucket(rows)} {_weight_key(weight)} e{router.experts} x{router.experts_per_token}{other}"
    axes = {"block_n": (32, 64), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.TuningKey(op, key, MoeConfig(), axes)  # pairs are sorted into blocks of the one height


def _weight_key(weight: Tiles) -> str:
    return f"n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"


def _num_shared_blocks(rows: int, shared: Any, config: MoeConfig) -> int:
    """Programs of the shared expert for each block of outputs."""
    return math.ceil(rows / config.block_m) if shared else 0


def _shared_constants(weight: Tiles) -> dict[str, Any]:
    return {f"S_{name}": value for name, value in weight_constants(weight).items() if name != "K"}
