"""The operations of experts: block sizes, checks and the launches."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels._implementation import Implementation, select_implementation
from pallas_kernels._kernel_args import array_or, compute_dtype, tile_operands
from pallas_kernels._launch import CompileOptions, KernelModule, LaunchError, check_counters, launch
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.reference import build_dispatch_ref, down_ref, gate_up_ref, max_blocks
from pallas_kernels.moe.types import Dispatch, RouterConfig
from pallas_kernels.quant_matmul.types import LinearOutput, SumSq
from pallas_kernels.tiles import Tiles, has_same_layout

kernels = KernelModule("pallas_kernels.moe.triton")


def build_dispatch(
    router: RouterConfig,
    layer_index: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> Dispatch:
    """Selects experts and sorts the pairs by them, for some tens of tokens.

    Args:
        router: How experts are selected.
        layer_index: ``int32 [1]``, index of the layer.
        logits: ``float32 [M, E]``.
        bias: ``float32 [L, E]``, added to the scores for the selection only.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Raises:
        NotImplementedError: If the named implementation cannot run.
    """
    if select_implementation(implementation) == "reference":
        return build_dispatch_ref(router, layer_index, logits, bias)
    m, block_m = logits.shape[0], MoeConfig().block_m
    blocks = max_blocks(router, m, block_m)
    per_block = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    results = launch(
        kernels.dispatch_kernel,
        {"logits": logits, "bias": bias, "layer_index": layer_index},
        {
            "expert_ids": per_block,
            "block_sizes": per_block,
            "pair_ids": jax.ShapeDtypeStruct((blocks, block_m), jnp.int32),
            "weights": jax.ShapeDtypeStruct((m * router.experts_per_token,), jnp.float32),
        },
        {"M": m, "ROUTER": router, "NUM_BLOCKS": blocks, "BLOCK_M": block_m},
        grid=(1,),
        options=CompileOptions(num_warps=4 if m <= 64 else 16),
    )
    return Dispatch(results["expert_ids"], results["weights"], results["block_sizes"], results["pair_ids"])


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
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Dispatch]:
    """Computes ``silu(gate(norm(x))) * up(norm(x))`` of the selected experts and of the shared one.

    Args:
        router: How experts are selected.
        x: ``[M, D]``, multiplied by the weight of its norm.
        sum_sq: Sums of squares of x before that.
        layer_index: ``int32 [1]``, index of the layer.
        logits: ``float32 [M, E]``.
        bias: ``float32 [L, E]``, added to the scores for the selection only.
        gate: ``[L, E, F, D]``.
        up: ``[L, E, F, D]``; the kernel needs the layout of ``gate``.
        shared: Gate and up of the shared expert, ``[L, F', D]``, or ``None``.
        eps: Epsilon of the norm.
        dispatch: Pairs from :func:`build_dispatch`; by default each pair is a block of its own.
        config: Block sizes; tuned or default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        ``[M * X * F + M * F']``, the rows of the pairs and then those of the shared expert; and the dispatch.

    Raises:
        LaunchError: If the shapes do not match.
        NotImplementedError: If the named implementation cannot run.
    """
    if x.shape[1] != gate.inputs:
        raise LaunchError(f"rows of {x.shape[1]} columns for experts of {gate.inputs} inputs")
    is_same = all(has_same_layout(a, b) for a, b in ((gate, up), shared or (gate, up)))
    if select_implementation(implementation, None if is_same else _LAYOUT_REASON) == "reference":
        return gate_up_ref(router, x, sum_sq, layer_index, logits, bias, gate, up, shared, eps=eps, dispatch=dispatch)
    m, pairs, width = x.shape[0], x.shape[0] * router.experts_per_token, gate.outputs
    config = config or tuned.lookup_config(moe_tuning_key("gate_up", router, m, gate, shared[0] if shared else None))
    _check_block_m(dispatch, config)
    shared_gate, shared_up = shared or (gate, up)
    shared_width = shared_gate.outputs if shared else 0
    num_blocks = pairs if dispatch is None else dispatch.expert_ids.shape[0]
    num_selected = 1 if dispatch else max(pairs, 1)
    results = launch(
        kernels.gate_up_kernel,
        {
            "x": x,
            "sum_sq": sum_sq.partials,
            "layer_index": layer_index,
            "logits": logits,
            "bias": bias,
            "expert_ids_in": layer_index if dispatch is None else dispatch.expert_ids,
            **_pair_operands(dispatch, layer_index),
            **tile_operands(gate, "gate"),
            **tile_operands(up, "up"),
            **tile_operands(shared_gate, "shared_gate"),
            **tile_operands(shared_up, "shared_up"),
        },
        {
            "out": jax.ShapeDtypeStruct((pairs * width + m * shared_width,), x.dtype),
            "expert_ids": jax.ShapeDtypeStruct((num_selected,), jnp.int32),
            "weights": jax.ShapeDtypeStruct((num_selected,), jnp.float32),
        },
        {
            "M": m,
            "ROUTER": router,
            "NORM": sum_sq.layout(eps),
            "NUM_BLOCKS": num_blocks,
            "IS_SORTED": dispatch is not None,
            "WEIGHT": gate.layout,
            "SHARED": shared_gate.layout,
            "SHARED_WIDTH": shared_width,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "DTYPE": compute_dtype(x.dtype),
        },
        grid=(
            math.ceil(max(width, shared_width) / config.block_n),
            num_blocks + (math.ceil(m / config.block_m) if shared else 0),
        ),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
    )
    return results["out"], dispatch or Dispatch(results["expert_ids"], results["weights"])


_LAYOUT_REASON = "gate and up must be stored in the same way"


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
    implementation: Implementation | None = None,
) -> tuple[LinearOutput, jax.Array]:
    """Adds the weighted outputs of the selected experts, and of the shared one, to the residual stream.

    Args:
        router: How experts are selected.
        h: Hidden rows from :func:`gate_up`.
        dispatch: Pairs from :func:`gate_up`.
        layer_index: ``int32 [1]``, index of the layer.
        weight: ``[L, E, D, F]``.
        shared: ``[L, D, F']`` of the shared expert, or ``None``.
        residual: ``float32 [M, D]``; ``None`` if a sum over devices follows.
        next_norm: ``[norms, D]``, weights of the norm that reads the result; ``None`` if a sum over devices follows.
        counters: ``int32`` zeros, at least one for each block of outputs.
        next_norm_offset: Added to ``layer_index`` for the index of that norm.
        config: Block sizes; tuned or default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        The residual stream in float32 with its sums of squares, the stream times the weight of the next norm in the
        dtype of h; and the counters, zero again.

    Raises:
        LaunchError: If blocks and block sizes do not match or there are too few counters.
        NotImplementedError: If the named implementation cannot run.
    """
    if select_implementation(implementation) == "reference":
        return down_ref(
            router,
            h,
            dispatch,
            layer_index,
            weight,
            shared,
            residual,
            next_norm,
            counters,
            next_norm_offset=next_norm_offset,
        )
    outputs, shared_width = weight.outputs, shared.inputs if shared else 0
    m = h.size // (router.experts_per_token * weight.inputs + shared_width)
    config = config or tuned.lookup_config(moe_tuning_key("down", router, m, weight, shared))
    _check_block_m(dispatch, config)
    num_blocks = dispatch.expert_ids.shape[0] if dispatch.is_sorted else m * router.experts_per_token
    output_blocks = math.ceil(outputs / config.block_n)
    check_counters(counters, output_blocks)
    results = launch(
        kernels.down_kernel,
        {
            "h": h,
            "expert_ids": dispatch.expert_ids,
            **_pair_operands(dispatch, layer_index),
            "weights": dispatch.weights,
            "layer_index": layer_index,
            **tile_operands(weight),
            **tile_operands(shared or weight, "shared"),
            "residual": array_or(residual, h),
            "next_norm": array_or(next_norm, h),
            "counters_in": counters,
        },
        {
            "out": jax.ShapeDtypeStruct((m, outputs), jnp.float32),
            "scaled": jax.ShapeDtypeStruct((1, 1) if next_norm is None else (m, outputs), h.dtype),
            "out_sum_sq": jax.ShapeDtypeStruct((m, output_blocks), jnp.float32),
            "partials": jax.ShapeDtypeStruct((router.experts_per_token + 1, m, outputs), jnp.float32),
            "counters": jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        },
        {
            "M": m,
            "ROUTER": router,
            "NUM_BLOCKS": num_blocks,
            "IS_SORTED": dispatch.is_sorted,
            "WEIGHT": weight.layout,
            "SHARED": (shared or weight).layout,
            "HAS_SHARED": shared is not None,
            "HAS_RESIDUAL": residual is not None,
            "HAS_NEXT_NORM": next_norm is not None,
            "NEXT_NORM_OFFSET": next_norm_offset,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "DTYPE": compute_dtype(h.dtype),
        },
        grid=(output_blocks, num_blocks + (math.ceil(m / config.block_m) if shared else 0)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={"counters_in": "counters"},
    )
    scaled = results["out"] if next_norm is None else results["scaled"]
    return LinearOutput(results["out"], scaled, SumSq(results["out_sum_sq"], 0, output_blocks)), results["counters"]


def _pair_operands(dispatch: Dispatch | None, placeholder: jax.Array) -> dict[str, jax.Array]:
    """Returns the arrays of sorted pairs, or placeholders."""
    return {
        "block_sizes": array_or(dispatch.block_sizes if dispatch else None, placeholder),
        "pair_ids": array_or(dispatch.pair_ids if dispatch else None, placeholder),
    }


def _check_block_m(dispatch: Dispatch | None, config: MoeConfig) -> None:
    if dispatch is not None and dispatch.pair_ids is not None and dispatch.pair_ids.shape[1] != config.block_m:
        raise LaunchError(f"blocks of {dispatch.pair_ids.shape[1]} pairs, and programs of {config.block_m} rows")


def moe_tuning_key(
    op: str, router: RouterConfig, rows: int, weight: Tiles, shared: Tiles | None
) -> tuned.TuningKey[MoeConfig]:
    """Returns the sizes that the block sizes of the expert kernels depend on.

    Args:
        op: "gate_up" or "down".
        router: How experts are selected.
        rows: Number of tokens.
        weight: Weight of the routed experts: gate, or down.
        shared: Weight of the shared expert, or ``None``.
    """
    shared_key = "" if shared is None else f" shared {_weight_key(shared)}"
    key = f"{tuned.rows_bucket(rows)} {_weight_key(weight)} e{router.experts} x{router.experts_per_token}{shared_key}"
    # ``block_m`` is fixed: it is the height of the blocks that pairs are sorted into.
    space = {"block_n": (32, 64), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.TuningKey(op, key, MoeConfig(), space)


def _weight_key(weight: Tiles) -> str:
    return f"n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
