"""One transformer block on one device's part of the weights, and the taps that let research look inside."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache, LayerCache
from glm_jax.config import Config
from glm_jax.model.hooks import ActivationHooks
from glm_jax.ops import experts, router
from glm_jax.ops.linear import Index, index_weight, linear
from glm_jax.ops.mla import AttentionForm, mla_attention, project_queries_and_latent
from glm_jax.ops.mlp import swiglu
from glm_jax.ops.norm import rms_norm
from glm_jax.sharding import Rules


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardContext:
    """What every block of one call shares.

    Attributes:
        positions: int32 ``[B, T]``.
        attention_form: of the attention.
    """

    cfg: Config
    rules: Rules
    positions: jax.Array
    attention_form: AttentionForm = "auto"
    hooks: ActivationHooks = dataclasses.field(default_factory=ActivationHooks)


def transformer_block(
    ctx: ForwardContext,
    h: jax.Array,
    cache: LatentCache | None,
    w: dict[str, Any],
    layer: Index,
    cache_layer: Index,
    name: str = "",
) -> tuple[jax.Array, LatentCache | None]:
    """``h + attention(norm(h))``, then ``+ feed_forward(norm(.))``.

    Args:
        h: residual stream ``[B, T, D]``.
        cache: of all layers, or ``None`` to attend to the new tokens alone.
        w: parameters of a run, stacked by layer.
        layer: index into the run's stacks.
        cache_layer: index into the cache's layers.
        name: prefix of the tap names, ``block.{i}``.

    Returns:
        The new residual stream and cache.
    """
    h = ctx.hooks(f"{name}.in", h)
    attention, cache = _attention(ctx, h, cache, w["attn"], layer, cache_layer)
    h = h + ctx.hooks(f"{name}.attn", attention)
    if "mlp" in w:
        out = ctx.hooks(f"{name}.mlp", _mlp_layer(ctx, h, w["mlp"], layer))
    else:
        out = ctx.hooks(f"{name}.moe", _moe_layer(ctx, h, w["moe"], layer, name))
    return ctx.hooks(f"{name}.out", h + out), cache


def _attention(
    ctx: ForwardContext, h: jax.Array, cache: LatentCache | None, w: dict[str, Any], layer: Index, slot: Index
) -> tuple[jax.Array, LatentCache | None]:
    cfg = ctx.cfg
    heads = w["k_b"].shape[1]
    x = rms_norm(h, index_weight(w["norm"], layer), cfg.rms_norm_eps)
    queries, new = project_queries_and_latent(cfg, x, w, layer, ctx.positions, heads)
    if cache is None:
        # The rows are the tokens themselves: a token's slot is its place in the row, wherever the row begins.
        own_slot = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], ctx.positions.shape)
        rows = LayerCache(new)
    else:
        own_slot = ctx.positions
        cache = cache.write(slot, own_slot, new, cfg.kv_lora_rank)
        # The new tokens too are seen as they are stored, so that it does not matter which call wrote a row.
        rows = cache.get_layer(slot)
    stored = None if cache is None else (cache, slot)
    out = mla_attention(cfg, queries, rows, own_slot, w, layer, ctx.attention_form, stored)
    # Partial sums over the devices' heads are added in float32.
    partial = linear(out.reshape(*out.shape[:2], -1), w["o"], layer, dtype=jnp.dtype(jnp.float32))
    return ctx.rules.psum(partial, "heads").astype(h.dtype), cache


def _mlp_layer(ctx: ForwardContext, h: jax.Array, w: dict[str, Any], layer: Index) -> jax.Array:
    x = rms_norm(h, index_weight(w["norm"], layer), ctx.cfg.rms_norm_eps)
    out = swiglu(x, w["gate"], w["up"], w["down"], layer, dtype=jnp.dtype(jnp.float32))
    return ctx.rules.psum(out, "ffn").astype(h.dtype)


def _moe_layer(ctx: ForwardContext, h: jax.Array, w: dict[str, Any], layer: Index, name: str) -> jax.Array:
    cfg, shape = ctx.cfg, h.shape
    x = rms_norm(h, index_weight(w["norm"], layer), cfg.rms_norm_eps).reshape(-1, shape[-1])
    routing = router.route(cfg, x, index_weight(w["router"], layer), index_weight(w["router_bias"], layer))
    if ctx.hooks:
        routing = _hook_routing(ctx, routing, shape, f"{name}.moe.router")
    routed = experts.apply_experts(x, routing, w, layer, ctx.rules)
    routed = ctx.hooks(f"{name}.moe.experts", routed.reshape(shape))
    shared = experts.apply_shared_experts(x, w, layer, ctx.rules).reshape(shape) if cfg.n_shared_experts else 0.0
    return (routed + shared).astype(h.dtype)


def _hook_routing(ctx: ForwardContext, routing: router.Routing, shape: tuple[int, ...], name: str) -> router.Routing:
    count = ctx.cfg.n_routed_experts
    dense = ctx.hooks(name, router.routing_to_dense(routing, count).reshape(*shape[:-1], count))
    return router.routing_from_dense(dense.reshape(-1, count)) if name in ctx.hooks.edit else routing
