"""The forward pass of few tokens in few kernels: eight for a layer of experts, nine for more than eight tokens.

The reference computes one operation after the other; here kernels begin and end where the data must cross the card, and
everything between is part of one of them:

====== =======================================================================================
 1     queries' latent and latent, from the normed residual stream
 2     queries in the space of the latents, rotated; the new row of the cache
 3     attention over shares of the cache
 4     the shares put together, values
 5     output projection, residual stream
 6     the router's logits
 7     chosen experts and shared expert: gate, up, their product
 8     down, weighted sum, residual stream
====== =======================================================================================

The residual stream is float32. A norm is never computed on its own: the kernel before it leaves the stream multiplied
by the norm's weight, and its sums of squares, and the kernel after it multiplies its products by ``1 / rms``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config, LayerGroup
from glm_jax.ops.linear import embed_tokens
from glm_jax.ops.rope import rope_table
from glm_jax.sharding import Rules
from glm_jax.weights import TiledWeight
from glm_jax.weights.params import leaves_with_path
from glm_jax.weights.tiling import is_tiled_path
from pallas_kernels import is_interpreted, kernels_available, mla_decode, moe
from pallas_kernels.quant_matmul import LinearOutput, SumSq, fused_linear
from pallas_kernels.tiles import has_same_layout

# More tokens go the way of prompts, whose products are made for many rows.
MAX_TOKENS, MAX_TOKENS_PER_ROW = 128, 8
# Of more tokens several are likely to share an expert: one more kernel, so that it is read once.
_MAX_UNSORTED_TOKENS = 8
_NUM_COUNTERS = 16_384
_COLUMN_BLOCK = 64


class ResidualStream(NamedTuple):
    """The residual stream of M tokens between two layers, and what goes along with it.

    Attributes:
        h: float32 ``[M, D]``.
        norm_scaled: ``[M, D]``, times the weight of the norm that comes next.
        sum_sq: float32 ``[M, blocks]``, sums of squares of h by block of columns.
        cache: of all layers.
        counters: zeros.
    """

    h: jax.Array
    norm_scaled: jax.Array
    sum_sq: jax.Array
    cache: mla_decode.LatentCacheArrays
    counters: jax.Array


def unsupported_reason(cfg: Config, body: dict[str, Any], rules: Rules = Rules()) -> str | None:
    """Why a model cannot be run by these kernels; None if it can."""
    if not kernels_available():
        return "there is no GPU, or no Triton"
    if unsupported := [axis for axis in ("batch", "seq", "embed", "latent", "experts") if getattr(rules, axis)]:
        return f"they run on devices that split heads, widths and vocabulary, not {unsupported[0]}"
    widths = (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
    if cfg.q_lora_rank is None:
        return "its queries have no latent"
    if cfg.n_group != 1:
        return "its experts are chosen by group"
    if any(width & (width - 1) for width in widths):
        return "the widths of latent and rope key must be powers of two"
    if cfg.qk_head_dim % _COLUMN_BLOCK or cfg.q_lora_rank % _COLUMN_BLOCK or cfg.kv_lora_rank % _COLUMN_BLOCK:
        return f"the widths of head and latents must be multiples of {_COLUMN_BLOCK}"
    plain = [
        "/".join(("runs", *path))
        for path, leaf in leaves_with_path(body["runs"])
        if not isinstance(leaf, TiledWeight) and is_tiled_path(("runs", *path))
    ]
    if plain:
        return f"the storage of {plain[0]} has no layout in tiles"
    if not is_interpreted() and body["embed"].dtype != jnp.bfloat16:
        return f"they compute in bfloat16, not in {jnp.dtype(body['embed'].dtype).name}"
    return next((problem for run in body["runs"].values() if (problem := _mismatched_storage(run))), None)


def _mismatched_storage(run: dict[str, Any]) -> str | None:
    """Weights that one kernel reads together but that are stored in different ways."""
    attn, feed = run["attn"], run.get("moe") or run["mlp"]
    if attn["q_a"].tiles.kind != attn["kv_a"].tiles.kind:
        return "q_a and kv_a are stored in different ways"
    for one, other in (("gate", "up"), ("shared_gate", "shared_up")):
        if one in feed and not has_same_layout(feed[one].tiles, feed[other].tiles):
            return f"{one} and {other} are stored in different ways"
    return None


def hidden_states(
    cfg: Config,
    body: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    rules: Rules = Rules(),
) -> tuple[jax.Array, LatentCache]:
    """States after the final norm ``[B, T, D]`` in the dtype of the embedding, and the cache; see :func:`forward_layers`."""
    made, cache = forward_layers(cfg, body, tokens, positions, cache, rules)
    factor = jax.lax.rsqrt(jnp.sum(made.sum_sq, axis=-1, keepdims=True) / made.h.shape[-1] + cfg.rms_norm_eps)
    normed = (made.norm_scaled.astype(jnp.float32) * factor).astype(made.norm_scaled.dtype)
    return normed.reshape(*tokens.shape, -1), cache


def forward_layers(
    cfg: Config,
    body: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    rules: Rules = Rules(),
) -> tuple[ResidualStream, LatentCache]:
    """What the layers leave, and the cache with the new tokens in it.

    Args:
        cfg: the model.
        body: ``embed``, ``runs`` and ``norm``; the matrices of the runs in tiles. Of several devices the local part.
        tokens: int32 ``[B, T]``.
        positions: int32 ``[B, T]``.
        cache: of all layers, on every device.
        rules: mesh axis of each logical axis: heads, widths and vocabulary may be split.

    Returns:
        The stream, of B times T tokens, with the final norm as the one that comes next; and the cache.
    """
    first = rules.axis_index("vocab") * body["embed"].shape[0]
    embedded = rules.psum(embed_tokens(body["embed"], tokens.reshape(-1), first), "vocab")
    dtype, h = embedded.dtype, embedded.astype(jnp.float32)
    flat = positions.reshape(-1)
    norms = jnp.concatenate([*(run["attn"]["norm"] for run in _layer_group_weights(cfg, body)), body["norm"][None]])
    stream = ResidualStream(
        h,
        (h * norms[:1].astype(jnp.float32)).astype(dtype),
        jnp.sum(h * h, axis=-1, keepdims=True),
        mla_decode.LatentCacheArrays(cache.data, cache.scales),
        jnp.zeros(_NUM_COUNTERS, jnp.int32),
    )
    table = jnp.stack(rope_table(flat, cfg.qk_rope_head_dim, cfg.rope_theta, dtype))  # together: one kernel
    shared = _LayerContext(cfg, rules, flat, table, norms)
    for run, weights in zip(cfg.layer_groups, _layer_group_weights(cfg, body), strict=True):
        stream = _apply_layer_group(shared, run, weights, stream)
    return stream, dataclasses.replace(cache, data=stream.cache.data, scales=stream.cache.scales)


class _LayerContext(NamedTuple):
    """What all layers have in common."""

    cfg: Config
    rules: Rules
    positions: jax.Array
    rope_cos_sin: jax.Array
    norms: jax.Array


def _layer_group_weights(cfg: Config, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [body["runs"][str(i)] for i in range(len(cfg.layer_groups))]


def _apply_layer_group(
    shared: _LayerContext, run: LayerGroup, w: dict[str, Any], stream: ResidualStream
) -> ResidualStream:
    attn = w["attn"]
    ones = jnp.ones((run.count, shared.cfg.qk_rope_head_dim), attn["norm"].dtype)
    latent_norms = jnp.concatenate([attn["q_a_norm"], attn["kv_a_norm"], ones], axis=1)

    # Spelled out: a loop would add its counter to every layer, and would hold the layers of a token apart.
    for i in range(run.count):
        stream = _layer(shared, run, w, latent_norms, i, stream)
    return stream


def _layer(
    shared: _LayerContext,
    run: LayerGroup,
    w: dict[str, Any],
    latent_norms: jax.Array,
    layer: int,
    stream: ResidualStream,
) -> ResidualStream:
    cfg, attn, place = shared.cfg, w["attn"], jnp.full(1, layer, jnp.int32)
    dtype, squares = stream.norm_scaled.dtype, SumSq(stream.sum_sq, 0, stream.sum_sq.shape[1])
    a, counters = fused_linear(
        stream.norm_scaled,
        attn["q_a"].tiles,
        place,
        stream.counters,
        second_weight=attn["kv_a"].tiles,
        sum_sq=squares,
        eps=cfg.rms_norm_eps,
        next_norm=latent_norms,
    )
    latents = _split_sum_sq(cfg, a.sum_sq)
    sizes = _attention_config(cfg, heads=attn["k_b"].shape[1])
    query, cache = mla_decode.absorbed_q_proj(
        sizes, a.scaled, latents, place, shared.positions, shared.rope_cos_sin, attn["q_b"].tiles, attn["k_b"].tiles,
        stream.cache, cache_layer_offset=run.start, dtype=dtype,
    )  # fmt: skip
    parts = mla_decode.flash_decode(sizes, query, cache, place, shared.positions, cache_layer_offset=run.start)
    attended = mla_decode.combine_v_proj(sizes, parts, place, attn["v_b"].tiles, dtype=dtype)
    feed = w.get("moe") or w["mlp"]
    split = bool(shared.rules.heads)
    mid, counters = fused_linear(
        attended, attn["o"].tiles, place, counters, residual=None if split else stream.h,
        next_norm=None if split else feed["norm"], dtype=jnp.float32, scaled_dtype=dtype,
    )  # fmt: skip
    if split:
        mid = _add_residual(shared.rules.psum(mid.out, "heads"), stream.h, feed["norm"][layer], dtype)
    split, next_from = bool(shared.rules.ffn), run.start + 1
    norms = None if split else shared.norms
    step = _moe_layer if "moe" in w else _mlp_layer
    made, counters = step(shared, feed, place, mid, counters, None if split else mid.out, norms, next_from)
    if split:
        made = _add_residual(shared.rules.psum(made.out, "ffn"), mid.out, shared.norms[next_from + layer], dtype)
    return ResidualStream(made.out, made.scaled, made.sum_sq.partials, cache, counters)


def _add_residual(added: jax.Array, h: jax.Array, norm: jax.Array, dtype: Any) -> LinearOutput:
    """What a kernel leaves when it adds to the residual stream itself, of a sum over devices."""
    out = h + added
    squares = SumSq(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1)
    return LinearOutput(out, (out * norm.astype(jnp.float32)[None]).astype(dtype), squares)


def _moe_layer(shared, w, place, mid, counters, residual, norms, next_from):  # noqa: ANN001, ANN202
    cfg = shared.cfg
    routed = moe.RouterConfig(
        experts=cfg.n_routed_experts,
        experts_per_token=cfg.num_experts_per_tok,
        normalize_weights=cfg.norm_topk_prob,
        scaling_factor=cfg.routed_scaling_factor,
    )
    logits, counters = fused_linear(
        mid.scaled, w["router"].tiles, place, counters, sum_sq=mid.squares, eps=cfg.rms_norm_eps, dtype=jnp.float32
    )
    both = (w["shared_gate"].tiles, w["shared_up"].tiles) if cfg.n_shared_experts else None
    bias = w["router_bias"]
    many = logits.out.shape[0] > _MAX_UNSORTED_TOKENS
    plan = moe.build_dispatch(routed, place, logits.out, bias) if many else None
    h, plan = moe.gate_up(
        routed, mid.scaled, mid.squares, place, logits.out, bias, w["gate"].tiles, w["up"].tiles, both,
        eps=cfg.rms_norm_eps, dispatch=plan,
    )  # fmt: skip
    shared_down = w["shared_down"].tiles if cfg.n_shared_experts else None
    return moe.down(
        routed, h, plan, place, w["down"].tiles, shared_down, residual, norms, counters, next_norm_offset=next_from
    )  # fmt: skip


def _mlp_layer(shared, w, place, mid, counters, residual, norms, next_from):  # noqa: ANN001, ANN202
    none = moe.RouterConfig(experts=1, experts_per_token=0, normalize_weights=False, scaling_factor=1.0)
    both = (w["gate"].tiles, w["up"].tiles)
    h, _ = moe.gate_up(none, mid.scaled, mid.squares, place, mid.out, mid.out, *both, both, eps=shared.cfg.rms_norm_eps)
    h = h.reshape(mid.scaled.shape[0], -1)
    return fused_linear(
        h, w["down"].tiles, place, counters, residual=residual, next_norm=norms, next_norm_offset=next_from, dtype=jnp.float32,
        scaled_dtype=h.dtype,
    )  # fmt: skip


def _attention_config(cfg: Config, heads: int) -> mla_decode.AttentionDims:
    return mla_decode.AttentionDims(
        heads=heads,
        nope=cfg.qk_nope_head_dim,
        rope=cfg.qk_rope_head_dim,
        latent=cfg.kv_lora_rank,
        value=cfg.v_head_dim,
        query_latent=cfg.q_lora_rank or 0,
        interleave=cfg.rope_interleave,
        eps=cfg.latent_eps,
    )


def _split_sum_sq(cfg: Config, squares: SumSq) -> tuple[SumSq, SumSq]:
    """Those of the queries' latent and of the latent; blocks do not cross from one to the other."""
    width = (cfg.q_lora_rank or 0) + cfg.cache_width
    block = _COLUMN_BLOCK if -(-width // _COLUMN_BLOCK) == squares.num_blocks else _COLUMN_BLOCK // 2
    first, count = (cfg.q_lora_rank or 0) // block, cfg.kv_lora_rank // block
    return SumSq(squares.partials, 0, first), SumSq(squares.partials, first, count)
