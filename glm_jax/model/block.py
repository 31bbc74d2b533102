"""One transformer block on one device's part of the weights, with hooks on its activations."""

from __future__ import annotations

import dataclasses

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
from glm_jax.weights import Weights
from glm_jax.weights.params import ParamTree

_FLOAT32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardContext:
    """Inputs that all blocks of one call share.

    Attributes:
        cfg: Config of the model.
        rules: Mesh axis of each logical axis.
        positions: ``int32 [B, T]``.
        attention_form: Form of the attention.
        hooks: Hooks on activations.
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
    w: ParamTree,
    layer: Index,
    cache_layer: Index,
    name: str = "",
) -> tuple[jax.Array, LatentCache | None]:
    """``h + attention(norm(h))``, then ``+ feed_forward(norm(.))``.

    Args:
        ctx: Inputs that all blocks share.
        h: Residual stream ``[B, T, D]``.
        cache: The cache of all layers, or None to attend to the new tokens alone.
        w: Parameters of a layer group, stacked by layer.
        layer: Index into the stacks.
        cache_layer: Index into the cache's layers.
        name: Prefix of the activations' names, ``block.{i}``.

    Returns:
        The new residual stream and the cache.
    """
    h = ctx.hooks(f"{name}.in", h)
    attention, cache = _attention(ctx, h, cache, w["attn"], layer, cache_layer)
    h = h + ctx.hooks(f"{name}.attn", attention)
    if "mlp" in w:
        out = ctx.hooks(f"{name}.mlp", _mlp_layer(ctx, h, w["mlp"], layer))
    else:
        out = ctx.hooks(f"{name}.moe", _moe_layer(ctx, h, w["moe"], layer, name))
    return ctx.hooks(f"{name}.out", h + out), cache


@jax.named_scope("attention")
def _attention(
    ctx: ForwardContext, h: jax.Array, cache: LatentCache | None, w: Weights, layer: Index, cache_layer: Index
) -> tuple[jax.Array, LatentCache | None]:
    cfg = ctx.cfg
    heads = w["k_b"].shape[1]
    x = rms_norm(h, index_weight(w["norm"], layer), cfg.rms_norm_eps)
    queries, new_rows = project_queries_and_latent(cfg, x, w, layer, ctx.positions, heads)
    if cache is None:
        # The new tokens are the whole context: a token's slot is its index in the row, whatever its position.
        slots = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], ctx.positions.shape)
        rows, cache_and_layer = LayerCache(new_rows), None
    else:
        slots = ctx.positions
        cache = cache.write(cache_layer, slots, new_rows, cfg.kv_lora_rank)
        # New tokens are read back as they are stored, so that it does not matter which call wrote a row.
        rows, cache_and_layer = cache.layer(cache_layer), (cache, cache_layer)
    out = mla_attention(cfg, queries, rows, slots, w, layer, ctx.attention_form, cache_and_layer)
    with jax.named_scope("o_proj"):
        # Partial sums over the devices' heads are added in float32.
        partial = linear(out.reshape(*out.shape[:2], -1), w["o"], layer, dtype=_FLOAT32)
        return ctx.rules.psum(partial, "heads").astype(h.dtype), cache


@jax.named_scope("mlp")
def _mlp_layer(ctx: ForwardContext, h: jax.Array, w: Weights, layer: Index) -> jax.Array:
    x = rms_norm(h, index_weight(w["norm"], layer), ctx.cfg.rms_norm_eps)
    out = swiglu(x, w["gate"], w["up"], w["down"], layer, dtype=_FLOAT32)
    return ctx.rules.psum(out, "ffn").astype(h.dtype)


@jax.named_scope("moe")
def _moe_layer(ctx: ForwardContext, h: jax.Array, w: Weights, layer: Index, name: str) -> jax.Array:
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
