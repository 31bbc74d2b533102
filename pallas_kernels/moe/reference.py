"""The operations of experts in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.types import Dispatch, RouterConfig
from pallas_kernels.quant_matmul.reference import dequantize_layer, inv_rms_ref, matmul_ref
from pallas_kernels.quant_matmul.types import LinearOutput, SumSq
from pallas_kernels.tiles import Tiles

_EXACT = jax.lax.Precision.HIGHEST


def route_ref(router: RouterConfig, logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the selected experts ``int32 [M, X]`` and their weights ``float32 [M, X]``.

    Args:
        router: How experts are selected.
        logits: ``float32 [M, E]``.
        bias: ``float32 [E]``, added to the scores for the selection only.
    """
    scores = jax.nn.sigmoid(logits)
    _, expert_ids = jax.lax.top_k(scores + bias[None], router.experts_per_token)
    weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if router.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return expert_ids, weights * router.scaling_factor


def max_blocks(router: RouterConfig, tokens: int, block_m: int) -> int:
    """Returns how many blocks of one expert each the pairs of some tokens can need."""
    pairs = tokens * router.experts_per_token
    return min(pairs, router.experts + pairs // block_m)


def build_dispatch_ref(router: RouterConfig, layer_index: jax.Array, logits: jax.Array, bias: jax.Array) -> Dispatch:
    """Reference of :func:`pallas_kernels.moe.build_dispatch`; padding of ``pair_ids`` is zero."""
    expert_ids, weights = route_ref(router, logits, bias[layer_index[0]])
    block_m, pair_experts = MoeConfig().block_m, expert_ids.reshape(-1)
    blocks = max_blocks(router, logits.shape[0], block_m)
    one_hot = jax.nn.one_hot(pair_experts, router.experts, dtype=jnp.int32)
    pairs_per_expert = jnp.sum(one_hot, axis=0)
    rank = jnp.take_along_axis(jnp.cumsum(one_hot, axis=0) - one_hot, pair_experts[:, None], axis=1)[:, 0]
    end = jnp.cumsum(-(-pairs_per_expert // block_m))
    first = end - -(-pairs_per_expert // block_m)
    position = first[pair_experts] * block_m + rank
    pairs = jnp.arange(pair_experts.size, dtype=jnp.int32)
    pair_ids = jnp.zeros(blocks * block_m, jnp.int32).at[position].set(pairs).reshape(blocks, block_m)
    block = jnp.arange(blocks, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(end, block, side="right"), router.experts - 1).astype(jnp.int32)
    is_used = block < end[-1]
    block_sizes = jnp.clip(pairs_per_expert[owner] - (block - first[owner]) * block_m, 0, block_m)
    sizes = jnp.where(is_used, block_sizes, 0).astype(jnp.int32)
    return Dispatch(jnp.where(is_used, owner, 0), weights.reshape(-1), sizes, pair_ids)


def gate_up_ref(
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
) -> tuple[jax.Array, Dispatch]:
    """Reference of :func:`pallas_kernels.moe.gate_up`."""
    layer = layer_index[0]
    expert_ids, weights = route_ref(router, logits, bias[layer])
    dispatch = dispatch or Dispatch(expert_ids.reshape(-1).astype(jnp.int32), weights.reshape(-1))
    rows = x.astype(jnp.float32) * inv_rms_ref(sum_sq, x.shape[1], eps)
    gate_out, up_out = (
        jnp.einsum("mk,mxfk->mxf", rows, dequantize_layer(w, layer)[expert_ids], precision=_EXACT) for w in (gate, up)
    )
    hidden = [(jax.nn.silu(gate_out) * up_out).reshape(-1)]
    if shared:
        gate_out, up_out = (matmul_ref(rows, w, layer) for w in shared)
        hidden.append((jax.nn.silu(gate_out) * up_out).reshape(-1))
    return jnp.concatenate(hidden).astype(x.dtype), dispatch


def down_ref(
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
) -> tuple[LinearOutput, jax.Array]:
    """Reference of :func:`pallas_kernels.moe.down`, with the sums of squares in one block."""
    layer = layer_index[0]
    m = h.size // (router.experts_per_token * weight.inputs + (shared.inputs if shared else 0))
    expert_ids = _pair_experts(dispatch).reshape(m, router.experts_per_token)
    weights = dispatch.weights[: m * router.experts_per_token].reshape(m, router.experts_per_token)
    pairs, rest = jnp.split(h.astype(jnp.float32), [m * router.experts_per_token * weight.inputs])
    pairs = pairs.reshape(m, router.experts_per_token, weight.inputs)
    outs = jnp.einsum("mxf,mxdf->mxd", pairs, dequantize_layer(weight, layer)[expert_ids], precision=_EXACT)
    out = jnp.sum(outs * weights[..., None], axis=1)
    if residual is not None:
        out = residual + out
    if shared:
        out = out + matmul_ref(rest.reshape(m, -1), shared, layer)
    scaled = out
    if next_norm is not None:
        scaled = (out * next_norm[layer + next_norm_offset][None].astype(jnp.float32)).astype(h.dtype)
    return LinearOutput(out, scaled, SumSq(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1)), counters


def _pair_experts(dispatch: Dispatch) -> jax.Array:
    """Returns the expert of each pair, ``int32 [M * X]``."""
    if dispatch.pair_ids is None or dispatch.block_sizes is None:
        return dispatch.expert_ids[: dispatch.weights.size]
    pairs = dispatch.weights.size
    column = jnp.arange(dispatch.pair_ids.shape[1], dtype=jnp.int32)[None]
    pair_ids = jnp.where(column < dispatch.block_sizes[:, None], dispatch.pair_ids, pairs)
    expert_ids = jnp.broadcast_to(dispatch.expert_ids[:, None], pair_ids.shape)
    return jnp.zeros(pairs, jnp.int32).at[pair_ids.reshape(-1)].set(expert_ids.reshape(-1), mode="drop")
