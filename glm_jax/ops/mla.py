"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

The cache keeps one row ``[latent | rope key]`` per token for all heads. New tokens attend to it in one of two forms
with the same result:

* *expanded*: keys and values of every head are computed from the latents; fewer operations per query-key pair;
* *absorbed*: the key and value projections are applied to query and output instead, and the latents themselves are
  keys and values; nothing is computed per key, which wins for few new tokens over a long context.

The scale is ``(nope + rope)^-1/2`` in both.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache, LayerCache
from glm_jax.config import Config
from glm_jax.ops import mla_prefill
from glm_jax.ops.linear import Index, einsum_f32, index_weight, linear, per_head_linear
from glm_jax.ops.norm import rms_norm
from glm_jax.ops.rope import apply_rope, rope_table
from glm_jax.sharding import vary_like
from glm_jax.weights import TiledWeight, Weight
from pallas_kernels import kernels_available

AttentionForm = Literal["auto", "absorbed", "expanded"]
Weights = dict[str, Weight]

# Keys attended to at a time: bounds the scores and the expanded keys of a long context.
KEY_BLOCK = 1024
_MASK_VALUE = -1e30  # finite, so that a fully masked block leaves no NaN in the running maximum


class QueryHeads(NamedTuple):
    """Query heads: ``nope [B, T, N, Hn]`` and rotated ``rope [B, T, N, P]``."""

    nope: jax.Array
    rope: jax.Array


def project_queries_and_latent(
    cfg: Config, x: jax.Array, w: Weights, layer: Index, positions: jax.Array, heads: int
) -> tuple[QueryHeads, jax.Array]:
    """Queries and cache rows of new tokens.

    Args:
        x: normed input ``[B, T, D]``.
        w: the attention parameters, stacked by layer.
        positions: int32 ``[B, T]``.
        heads: query heads on this device.

    Returns:
        The queries, and the rows ``[B, T, R + P]`` to cache: the normed latent and the rotated rope key.
    """
    if cfg.q_lora_rank is None:
        q = linear(x, w["q"], layer)
    else:
        q = linear(
            rms_norm(linear(x, w["q_a"], layer), index_weight(w["q_a_norm"], layer), cfg.latent_eps), w["q_b"], layer
        )
    nope, rope = jnp.split(q.reshape(*x.shape[:2], heads, cfg.qk_head_dim), [cfg.qk_nope_head_dim], axis=-1)
    latent, key = jnp.split(linear(x, w["kv_a"], layer), [cfg.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, index_weight(w["kv_a_norm"], layer), cfg.latent_eps)
    cos, sin = rope_table(positions, cfg.qk_rope_head_dim, cfg.rope_theta, x.dtype)
    key = apply_rope(key, cos, sin, interleave=cfg.rope_interleave)
    rope = apply_rope(rope, cos[:, :, None], sin[:, :, None], interleave=cfg.rope_interleave)
    return QueryHeads(nope, rope), jnp.concatenate([latent, key], axis=-1)


def mla_attention(
    cfg: Config,
    q: QueryHeads,
    rows: LayerCache,
    positions: jax.Array,
    w: Weights,
    layer: Index,
    form: AttentionForm = "auto",
    cache_and_layer: tuple[LatentCache, Index] | None = None,
) -> jax.Array:
    """Causal attention of new tokens over cached rows.

    Args:
        q: queries of ``T`` tokens.
        rows: of ``S`` slots as they are stored; slot ``s`` holds the token at position ``s``.
        positions: int32 ``[B, T]``; a query sees slots up to its own position.
        w: ``k_b [.., N, Hn, R]`` and ``v_b [.., N, Hv, R]``, stacked by layer.
        form: "auto" takes the cheaper one for these shapes.
        cache_and_layer: the cache that the rows are of, and its layer: a kernel reads them there.

    Returns:
        ``[B, T, N, Hv]``.
    """
    length, slots = positions.shape[1], rows.num_slots
    by_kernel = cache_and_layer is not None and isinstance(w["k_b"], TiledWeight) and kernels_available()
    if form == "auto":
        # A kernel writes no scores, which is worth more than some products less.
        expanded = (by_kernel and length > 1) or is_expanded_cheaper(cfg, length, slots)
        form = "expanded" if expanded else "absorbed"
    scale = cfg.qk_head_dim**-0.5
    read = functools.partial(LayerCache.dequantize, latent=cfg.kv_lora_rank, dtype=q.nope.dtype)
    if form == "expanded":
        k_b, v_b = index_weight(w["k_b"], layer), index_weight(w["v_b"], layer)
        if cache_and_layer is not None and by_kernel:
            return mla_prefill.prefill_attention(
                cfg, _concat_rope(q.nope, q.rope), *cache_and_layer, positions, k_b, v_b
            )
        return _softmax_attention(
            lambda block: _expanded_scores_and_values(cfg, q, read(block), k_b, v_b),
            rows,
            positions,
            scale,
            q.nope,
            cfg.v_head_dim,
        ).astype(q.nope.dtype)
    query = jnp.concatenate([per_head_linear(q.nope, w["k_b"], layer, transpose=True), q.rope], axis=-1)

    def score(block: LayerCache) -> tuple[jax.Array, jax.Array]:
        values = read(block)
        return einsum_f32("btnr,bsr->bnts", query, values), values[:, :, None]

    latent = _softmax_attention(score, rows, positions, scale, q.nope, cfg.cache_width)
    return per_head_linear(latent[..., : cfg.kv_lora_rank].astype(q.nope.dtype), w["v_b"], layer)


def is_expanded_cheaper(cfg: Config, new_tokens: int, slots: int) -> bool:
    """Whether expanding ``slots`` keys costs fewer multiplications than absorbing ``new_tokens`` queries."""
    projection = (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank
    expanded = slots * projection + new_tokens * slots * (cfg.qk_head_dim + cfg.v_head_dim)
    absorbed = new_tokens * projection + new_tokens * slots * (cfg.cache_width + cfg.kv_lora_rank)
    return expanded < absorbed


def _expanded_scores_and_values(
    cfg: Config, q: QueryHeads, block: jax.Array, k_b: jax.Array, v_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    latent, rope = jnp.split(block, [cfg.kv_lora_rank], axis=-1)
    keys = einsum_f32("bsr,nhr->bsnh", latent, k_b).astype(q.nope.dtype)
    values = einsum_f32("bsr,nhr->bsnh", latent, v_b).astype(q.nope.dtype)
    # One product over both parts: two would write the scores twice.
    shared = jnp.broadcast_to(rope[:, :, None], (*keys.shape[:3], rope.shape[-1]))
    scores = einsum_f32("btnh,bsnh->bnts", _concat_rope(q.nope, q.rope), _concat_rope(keys, shared))
    return scores, values


def _concat_rope(nope: jax.Array, rope: jax.Array) -> jax.Array:
    return jnp.concatenate([nope, rope.astype(nope.dtype)], axis=-1)


def _softmax_attention(score, rows, positions, scale, q, width):  # noqa: ANN001, ANN202
    """``softmax(scores) @ values`` in float32, over key blocks when the context is long.

    ``score(block)`` gives scores ``[B, N, T, s]`` and values ``[B, s, N or 1, width]`` of some of the rows; it is what
    reads them, so that of a long context no more than a block is ever held in a wider dtype than it is stored in.
    """
    if rows.slots <= 2 * KEY_BLOCK:
        scores, values = score(rows)
        scores = _apply_causal_mask(scores * scale, positions, 0)
        weights = jax.nn.softmax(scores, axis=-1)
        return _weighted_values(weights.astype(q.dtype), values)
    return _blockwise_attention(score, rows, positions, scale, q, width)


def _blockwise_attention(score, rows, positions, scale, q, width):  # noqa: ANN001, ANN202
    batch, length, heads, _ = q.shape
    blocks = -(-rows.slots // KEY_BLOCK)
    rows = rows.padded(blocks * KEY_BLOCK)
    last = jnp.max(positions)

    def attend_block(carry, i):  # noqa: ANN001, ANN202
        top, total, out = carry
        scores, values = score(rows.part(i * KEY_BLOCK, KEY_BLOCK))
        scores = _apply_causal_mask(scores * scale, positions, i * KEY_BLOCK)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, rescale = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        total = total * rescale + jnp.sum(weights, axis=-1)
        out = out * jnp.moveaxis(rescale, 1, 2)[..., None] + _weighted_values(weights.astype(q.dtype), values)
        return new_top, total, out

    def step(carry, i):  # noqa: ANN001, ANN202
        # Blocks past the newest token are not read.
        return jax.lax.cond(i * KEY_BLOCK <= last, attend_block, lambda c, _: c, carry, i), None

    shape = (batch, heads, length)
    start = (
        jnp.full(shape, _MASK_VALUE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((batch, length, heads, width), jnp.float32),
    )
    start = tuple(vary_like(x, q) for x in start)
    (_, total, out), _ = jax.lax.scan(step, start, jnp.arange(blocks, dtype=jnp.int32))
    return out / jnp.moveaxis(total, 1, 2)[..., None]


def _apply_causal_mask(scores: jax.Array, positions: jax.Array, first_slot: Index) -> jax.Array:
    slots = first_slot + jnp.arange(scores.shape[-1], dtype=jnp.int32)
    visible = slots[None, None, :] <= positions[:, :, None]
    return jnp.where(visible[:, None], scores, _MASK_VALUE)


def _weighted_values(weights: jax.Array, values: jax.Array) -> jax.Array:
    if values.shape[2] == 1:  # one value per slot for all heads
        return einsum_f32("bnts,bsw->btnw", weights, values[:, :, 0])
    return einsum_f32("bnts,bsnw->btnw", weights, values)
