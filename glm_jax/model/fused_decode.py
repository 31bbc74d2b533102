"""The forward pass of few tokens in few kernels: eight per layer of experts, nine for more than eight tokens.

The reference computes one operation after the other. Here a kernel ends only where its result must be visible to the
whole card, and everything between is part of one kernel:

====== =======================================================================================
 1     latents of queries and cache (q_a, kv_a), from the normed residual stream
 2     queries absorbed into latent space and rotated (q_b, k_b); the new row of the cache
 3     attention over splits of the cache (flash decode)
 4     the splits combined, values (v_b)
 5     output projection (o), residual stream
 6     router logits
 7     gate, up and their product, of chosen and shared experts
 8     down, weighted sum, residual stream
====== =======================================================================================

The residual stream is float32. A norm is never computed on its own: the kernel before it writes the stream scaled by
the norm's weight and its sums of squares, and the kernel after it multiplies its products by ``1 / rms``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config, LayerGroup
from glm_jax.model.kernel_selection import COLUMN_BLOCK
from glm_jax.ops.linear import embed_tokens
from glm_jax.ops.rope import rope_table
from glm_jax.sharding import Rules
from glm_jax.weights.params import ParamTree
from pallas_kernels import mla_decode, moe
from pallas_kernels.quant_matmul import LinearOutput, SumSq, fused_linear

# More tokens take the path of prompts, whose products are tuned for many rows.
MAX_TOKENS, MAX_TOKENS_PER_ROW = 128, 8
# Beyond this, several tokens are likely to share an expert: one more kernel sorts them, and the expert is read once.
_MAX_UNSORTED_TOKENS = 8
_NUM_COUNTERS = 16_384


class ResidualStream(NamedTuple):
    """The residual stream of M tokens between two layers, with the state that kernels hand on.

    Attributes:
        h: ``float32 [M, D]``.
        norm_scaled: ``[M, D]``, ``h`` times the weight of the next norm, in the activations' dtype.
        sum_sq: ``float32 [M, blocks]``, sums of squares of ``h`` by block of columns.
        cache: The cache of all layers.
        counters: Zeros ``int32 [n]``; kernels count with them and reset them.
    """

    h: jax.Array
    norm_scaled: jax.Array
    sum_sq: jax.Array
    cache: mla_decode.LatentCacheArrays
    counters: jax.Array


def hidden_states(
    cfg: Config,
    body: ParamTree,
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    rules: Rules = Rules(),
) -> tuple[jax.Array, LatentCache]:
    """States after the final norm ``[B, T, D]`` in the dtype of the embedding, and the cache.

    Arguments as for :func:`forward_layers`.
    """
    stream, cache = forward_layers(cfg, body, tokens, positions, cache, rules)
    factor = jax.lax.rsqrt(jnp.sum(stream.sum_sq, axis=-1, keepdims=True) / stream.h.shape[-1] + cfg.rms_norm_eps)
    normed = (stream.norm_scaled.astype(jnp.float32) * factor).astype(stream.norm_scaled.dtype)
    return normed.reshape(*tokens.shape, -1), cache


def forward_layers(
    cfg: Config,
    body: ParamTree,
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    rules: Rules = Rules(),
) -> tuple[ResidualStream, LatentCache]:
    """The residual stream after the last layer, and the cache with the new tokens.

    Args:
        cfg: Config of the model.
        body: ``embed``, ``runs`` and ``norm``, the matrices of the layer groups in tiles; this device's part.
        tokens: ``int32 [B, T]``.
        positions: ``int32 [B, T]``.
        cache: The cache of all layers, whole on every device.
        rules: Mesh axis of each logical axis; heads, widths and vocabulary may be split.

    Returns:
        The stream of ``B * T`` tokens, scaled for the final norm, and the cache.
    """
    first_row = rules.index("vocab") * body["embed"].shape[0]
    embedded = rules.psum(embed_tokens(body["embed"], tokens.reshape(-1), first_row), "vocab")
    dtype, h = embedded.dtype, embedded.astype(jnp.float32)
    flat = positions.reshape(-1)
    group_weights = [body["runs"][str(i)] for i in range(len(cfg.layer_groups))]
    norms = jnp.concatenate([*(w["attn"]["norm"] for w in group_weights), body["norm"][None]])
    stream = ResidualStream(
        h,
        (h * norms[:1].astype(jnp.float32)).astype(dtype),
        jnp.sum(h * h, axis=-1, keepdims=True),
        mla_decode.LatentCacheArrays(cache.data, cache.scales),
        jnp.zeros(_NUM_COUNTERS, jnp.int32),
    )
    table = jnp.stack(rope_table(flat, cfg.qk_rope_head_dim, cfg.rope_theta, dtype))  # one array: one kernel
    ctx = _LayerContext(cfg, rules, flat, table, norms)
    for i, (group, w) in enumerate(zip(cfg.layer_groups, group_weights, strict=True)):
        with jax.named_scope(f"layer_group_{i}"):
            stream = _apply_layer_group(ctx, group, w, stream)
    return stream, dataclasses.replace(cache, data=stream.cache.data, scales=stream.cache.scales)


class _LayerContext(NamedTuple):
    """Inputs that all layers share.

    Attributes:
        cfg: Config of the model.
        rules: Mesh axis of each logical axis.
        positions: ``int32 [M]``.
        rope_cos_sin: Cosines and sines, ``[2, M, P/2]``.
        norms: Weights of the norm before each layer's attention and of the final norm, ``[L + 1, D]``.
    """

    cfg: Config
    rules: Rules
    positions: jax.Array
    rope_cos_sin: jax.Array
    norms: jax.Array


def _apply_layer_group(ctx: _LayerContext, group: LayerGroup, w: ParamTree, stream: ResidualStream) -> ResidualStream:
    attn = w["attn"]
    ones = jnp.ones((group.count, ctx.cfg.qk_rope_head_dim), attn["norm"].dtype)
    latent_norms = jnp.concatenate([attn["q_a_norm"], attn["kv_a_norm"], ones], axis=1)

    # Unrolled: a loop would add its counter to every layer, and would break a token's CUDA graph between layers.
    for i in range(group.count):
        stream = _layer(ctx, group, w, latent_norms, i, stream)
    return stream


def _layer(
    ctx: _LayerContext,
    group: LayerGroup,
    w: ParamTree,
    latent_norms: jax.Array,
    layer: int,
    stream: ResidualStream,
) -> ResidualStream:
    layer_index, dtype = jnp.full(1, layer, jnp.int32), stream.norm_scaled.dtype
    with jax.named_scope("attention"):
        attended, cache, counters = _attention(ctx, group, w["attn"], latent_norms, layer_index, stream)
    feed_forward = w.get("moe") or w["mlp"]
    heads_split, ffn_split = bool(ctx.rules.heads), bool(ctx.rules.ffn)
    with jax.named_scope("o_proj"):
        mid, counters = fused_linear(
            attended, w["attn"]["o"].tiles, layer_index, counters, residual=None if heads_split else stream.h,
            next_norm=None if heads_split else feed_forward["norm"], dtype=jnp.float32, scaled_dtype=dtype,
        )  # fmt: skip
        if heads_split:
            mid = _add_residual(ctx.rules.psum(mid.out, "heads"), stream.h, feed_forward["norm"][layer], dtype)
    next_norm_offset = group.start + 1
    step = _moe_layer if "moe" in w else _mlp_layer
    with jax.named_scope("moe" if "moe" in w else "mlp"):
        out, counters = step(
            ctx, feed_forward, layer_index, mid, counters, None if ffn_split else mid.out,
            None if ffn_split else ctx.norms, next_norm_offset,
        )  # fmt: skip
        if ffn_split:
            out = _add_residual(ctx.rules.psum(out.out, "ffn"), mid.out, ctx.norms[next_norm_offset + layer], dtype)
    return ResidualStream(out.out, out.scaled, out.sum_sq.partials, cache, counters)


def _attention(
    ctx: _LayerContext,
    group: LayerGroup,
    attn: ParamTree,
    latent_norms: jax.Array,
    layer_index: jax.Array,
    stream: ResidualStream,
) -> tuple[jax.Array, mla_decode.LatentCacheArrays, jax.Array]:
    """Kernels 1 to 4: values of the heads ``[M, N * Hv]``, the cache, and the counters."""
    cfg, dtype = ctx.cfg, stream.norm_scaled.dtype
    latents, counters = fused_linear(
        stream.norm_scaled,
        attn["q_a"].tiles,
        layer_index,
        stream.counters,
        second_weight=attn["kv_a"].tiles,
        sum_sq=SumSq(stream.sum_sq, 0, stream.sum_sq.shape[1]),
        eps=cfg.rms_norm_eps,
        next_norm=latent_norms,
    )
    dims = _attention_dims(cfg, heads=attn["k_b"].shape[1])
    query, cache = mla_decode.absorbed_q_proj(
        dims, latents.scaled, _split_sum_sq(cfg, latents.sum_sq), layer_index, ctx.positions, ctx.rope_cos_sin,
        attn["q_b"].tiles, attn["k_b"].tiles, stream.cache, cache_layer_offset=group.start, dtype=dtype,
    )  # fmt: skip
    partials = mla_decode.flash_decode(dims, query, cache, layer_index, ctx.positions, cache_layer_offset=group.start)
    return mla_decode.combine_v_proj(dims, partials, layer_index, attn["v_b"].tiles, dtype=dtype), cache, counters


def _add_residual(added: jax.Array, h: jax.Array, norm: jax.Array, dtype: DTypeLike) -> LinearOutput:
    """Adds a sum over devices to the residual stream, which a kernel does itself on one device."""
    out = h + added
    sum_sq = SumSq(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1)
    return LinearOutput(out, (out * norm.astype(jnp.float32)[None]).astype(dtype), sum_sq)


def _moe_layer(
    ctx: _LayerContext,
    w: ParamTree,
    layer_index: jax.Array,
    mid: LinearOutput,
    counters: jax.Array,
    residual: jax.Array | None,
    norms: jax.Array | None,
    next_norm_offset: int,
) -> tuple[LinearOutput, jax.Array]:
    """Kernels 6 to 8."""
    cfg = ctx.cfg
    router_config = moe.RouterConfig(
        experts=cfg.n_routed_experts,
        experts_per_token=cfg.num_experts_per_tok,
        normalize_weights=cfg.norm_topk_prob,
        scaling_factor=cfg.routed_scaling_factor,
    )
    logits, counters = fused_linear(
        mid.scaled, w["router"].tiles, layer_index, counters, sum_sq=mid.sum_sq, eps=cfg.rms_norm_eps,
        dtype=jnp.float32,
    )  # fmt: skip
    shared_gate_up = (w["shared_gate"].tiles, w["shared_up"].tiles) if cfg.n_shared_experts else None
    bias = w["router_bias"]
    sort_tokens = logits.out.shape[0] > _MAX_UNSORTED_TOKENS
    dispatch = moe.build_dispatch(router_config, layer_index, logits.out, bias) if sort_tokens else None
    hidden, dispatch = moe.gate_up(
        router_config, mid.scaled, mid.sum_sq, layer_index, logits.out, bias, w["gate"].tiles, w["up"].tiles,
        shared_gate_up, eps=cfg.rms_norm_eps, dispatch=dispatch,
    )  # fmt: skip
    shared_down = w["shared_down"].tiles if cfg.n_shared_experts else None
    return moe.down(
        router_config, hidden, dispatch, layer_index, w["down"].tiles, shared_down, residual, norms, counters,
        next_norm_offset=next_norm_offset,
    )  # fmt: skip


def _mlp_layer(
    ctx: _LayerContext,
    w: ParamTree,
    layer_index: jax.Array,
    mid: LinearOutput,
    counters: jax.Array,
    residual: jax.Array | None,
    norms: jax.Array | None,
    next_norm_offset: int,
) -> tuple[LinearOutput, jax.Array]:
    """A dense feed-forward: one shared expert without routed ones, then a product."""
    no_routing = moe.RouterConfig(experts=1, experts_per_token=0, normalize_weights=False, scaling_factor=1.0)
    gate_up = (w["gate"].tiles, w["up"].tiles)
    hidden, _ = moe.gate_up(
        no_routing, mid.scaled, mid.sum_sq, layer_index, mid.out, mid.out, *gate_up, gate_up, eps=ctx.cfg.rms_norm_eps
    )
    hidden = hidden.reshape(mid.scaled.shape[0], -1)
    return fused_linear(
        hidden, w["down"].tiles, layer_index, counters, residual=residual, next_norm=norms,
        next_norm_offset=next_norm_offset, dtype=jnp.float32, scaled_dtype=hidden.dtype,
    )  # fmt: skip


def _attention_dims(cfg: Config, heads: int) -> mla_decode.AttentionDims:
    return mla_decode.AttentionDims(
        heads=heads,
        nope=cfg.qk_nope_head_dim,
        rope=cfg.qk_rope_head_dim,
        latent=cfg.kv_lora_rank,
        value_dim=cfg.v_head_dim,
        query_latent=cfg.q_lora_rank or 0,
        interleave=cfg.rope_interleave,
        eps=cfg.latent_eps,
    )


def _split_sum_sq(cfg: Config, sum_sq: SumSq) -> tuple[SumSq, SumSq]:
    """Sums of squares of the queries' latent and of the cached latent; no block contains columns of both."""
    width = (cfg.q_lora_rank or 0) + cfg.cache_width
    block = COLUMN_BLOCK if -(-width // COLUMN_BLOCK) == sum_sq.num_blocks else COLUMN_BLOCK // 2
    first, count = (cfg.q_lora_rank or 0) // block, cfg.kv_lora_rank // block
    return SumSq(sum_sq.partials, 0, first), SumSq(sum_sq.partials, first, count)
