"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

The cache keeps one row ``[latent | rope key]`` per token for all heads. New tokens attend to it in one of two forms
with the same result:

* *expanded*: keys and values of every head are computed from the latents; fewer operations per query-key pair;
* *absorbed*: the key and value projections are applied to query and output instead, and the latents themselves are
  keys and values. Nothing is computed per key, which wins for few new tokens over a long context.

The softmax scale is ``(Hn + P)^-1/2`` in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache, LayerCache
from glm_jax.config import Config
from glm_jax.ops import mla_prefill
from glm_jax.ops.linear import Index, einsum_f32, index_weight, linear, per_head_linear
from glm_jax.ops.norm import rms_norm
from glm_jax.ops.rope import apply_rope, rope_table
from glm_jax.sharding import vary_like
from glm_jax.weights import Weights, as_weight_matrix

AttentionForm = Literal["auto", "absorbed", "expanded"]
_ScoreFn: TypeAlias = Callable[[LayerCache], tuple[jax.Array, jax.Array]]
_SoftmaxState: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # row_max, row_sum, acc

# Keys attended to at a time: bounds the scores and the expanded keys of a long context.
KEY_BLOCK = 1024
_MASK_VALUE = -1e30  # finite, so that a fully masked block leaves no NaN in the running maximum


class QueryHeads(NamedTuple):
    """Query heads.

    Attributes:
        nope: The part without position, ``[B, T, N, Hn]``.
        rope: The rotated part, ``[B, T, N, P]``.
    """

    nope: jax.Array
    rope: jax.Array


def project_queries_and_latent(
    cfg: Config, x: jax.Array, w: Weights, layer: Index, positions: jax.Array, heads: int
) -> tuple[QueryHeads, jax.Array]:
    """Queries and cache rows of new tokens.

    Args:
        cfg: Config of the model.
        x: Normed input ``[B, T, D]``.
        w: Parameters of the attention, stacked by layer.
        layer: Index into the stacks.
        positions: ``int32 [B, T]``.
        heads: Query heads on this device.

    Returns:
        The queries, and the rows ``[B, T, R + P]`` to cache: the normed latent and the rotated rope key.
    """
    with jax.named_scope("q_proj"):
        q = _project_queries(cfg, x, w, layer)
        nope, rope = jnp.split(q.reshape(*x.shape[:2], heads, cfg.qk_head_dim), [cfg.qk_nope_head_dim], axis=-1)
    with jax.named_scope("kv_proj"):
        latent, key = jnp.split(linear(x, w["kv_a"], layer), [cfg.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, index_weight(w["kv_a_norm"], layer), cfg.latent_eps)
    with jax.named_scope("rope"):
        cos, sin = rope_table(positions, cfg.qk_rope_head_dim, cfg.rope_theta, x.dtype)
        key = apply_rope(key, cos, sin, interleave=cfg.rope_interleave)
        rope = apply_rope(rope, cos[:, :, None], sin[:, :, None], interleave=cfg.rope_interleave)
    return QueryHeads(nope, rope), jnp.concatenate([latent, key], axis=-1)


def _project_queries(cfg: Config, x: jax.Array, w: Weights, layer: Index) -> jax.Array:
    if cfg.q_lora_rank is None:
        return linear(x, w["q"], layer)
    latent = rms_norm(linear(x, w["q_a"], layer), index_weight(w["q_a_norm"], layer), cfg.latent_eps)
    return linear(latent, w["q_b"], layer)


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
        cfg: Config of the model.
        q: Queries of ``T`` tokens.
        rows: ``S`` slots of one layer as the cache stores them; slot ``s`` holds the token at position ``s``.
        positions: ``int32 [B, T]``; a query sees slots up to its own position.
        w: ``k_b [l, N, Hn, R]`` and ``v_b [l, N, Hv, R]``, stacked by layer.
        layer: Index into the stacks.
        form: "auto" takes the cheaper form for these shapes.
        cache_and_layer: The cache that ``rows`` comes from and its layer, which a kernel reads instead.

    Returns:
        ``[B, T, N, Hv]``.
    """
    # The prefill kernel never writes a score, which is worth more than saving some products.
    use_kernel = cache_and_layer is not None and as_weight_matrix(w["k_b"]).runs_in_kernels
    if form == "auto":
        length = positions.shape[1]
        expanded = (use_kernel and length > 1) or is_expanded_cheaper(cfg, length, rows.num_slots)
        form = "expanded" if expanded else "absorbed"
    if form == "absorbed":
        return _absorbed_attention(cfg, q, rows, positions, w, layer)
    if cache_and_layer is not None and use_kernel:
        with jax.named_scope("prefill_attention"):
            k_b, v_b = index_weight(w["k_b"], layer), index_weight(w["v_b"], layer)
            query = _concat_rope(q.nope, q.rope)
            return mla_prefill.prefill_attention(cfg, query, *cache_and_layer, positions, k_b, v_b)
    return _expanded_attention(cfg, q, rows, positions, w, layer)


def is_expanded_cheaper(cfg: Config, new_tokens: int, slots: int) -> bool:
    """Whether expanding ``slots`` keys costs fewer multiplications than absorbing ``new_tokens`` queries."""
    projection = (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank
    expanded = slots * projection + new_tokens * slots * (cfg.qk_head_dim + cfg.v_head_dim)
    absorbed = new_tokens * projection + new_tokens * slots * (cfg.cache_width + cfg.kv_lora_rank)
    return expanded < absorbed


@jax.named_scope("absorbed_attention")
def _absorbed_attention(
    cfg: Config, q: QueryHeads, rows: LayerCache, positions: jax.Array, w: Weights, layer: Index
) -> jax.Array:
    query = jnp.concatenate([per_head_linear(q.nope, w["k_b"], layer, transpose=True), q.rope], axis=-1)

    def score(block: LayerCache) -> tuple[jax.Array, jax.Array]:
        values = block.dequantize(cfg.kv_lora_rank, q.nope.dtype)
        return einsum_f32("btnr,bsr->bnts", query, values), values[:, :, None]

    latent = _softmax_attention(score, rows, positions, cfg.qk_head_dim**-0.5, q.nope, cfg.cache_width)
    return per_head_linear(latent[..., : cfg.kv_lora_rank].astype(q.nope.dtype), w["v_b"], layer)


@jax.named_scope("expanded_attention")
def _expanded_attention(
    cfg: Config, q: QueryHeads, rows: LayerCache, positions: jax.Array, w: Weights, layer: Index
) -> jax.Array:
    k_b, v_b = index_weight(w["k_b"], layer), index_weight(w["v_b"], layer)

    def score(block: LayerCache) -> tuple[jax.Array, jax.Array]:
        return _expanded_scores_and_values(cfg, q, block.dequantize(cfg.kv_lora_rank, q.nope.dtype), k_b, v_b)

    out = _softmax_attention(score, rows, positions, cfg.qk_head_dim**-0.5, q.nope, cfg.v_head_dim)
    return out.astype(q.nope.dtype)


def _expanded_scores_and_values(
    cfg: Config, q: QueryHeads, block: jax.Array, k_b: jax.Array, v_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores ``[B, N, T, s]`` and values ``[B, s, N, Hv]`` of cache rows ``[B, s, R + P]``."""
    latent, rope = jnp.split(block, [cfg.kv_lora_rank], axis=-1)
    keys = einsum_f32("bsr,nhr->bsnh", latent, k_b).astype(q.nope.dtype)
    values = einsum_f32("bsr,nhr->bsnh", latent, v_b).astype(q.nope.dtype)
    # One product over both parts: two would write the scores twice.
    shared = jnp.broadcast_to(rope[:, :, None], (*keys.shape[:3], rope.shape[-1]))
    scores = einsum_f32("btnh,bsnh->bnts", _concat_rope(q.nope, q.rope), _concat_rope(keys, shared))
    return scores, values


def _concat_rope(nope: jax.Array, rope: jax.Array) -> jax.Array:
    return jnp.concatenate([nope, rope.astype(nope.dtype)], axis=-1)


def _softmax_attention(
    score: _ScoreFn, rows: LayerCache, positions: jax.Array, scale: float, q: jax.Array, width: int
) -> jax.Array:
    """``softmax(scores) @ values`` in float32, over key blocks when the context is long.

    Args:
        score: Gives scores ``[B, N, T, s]`` and values ``[B, s, N or 1, width]`` of some of the rows. It alone
            dequantizes rows, so that no more than a block of a long context is ever held in a wider dtype.
        rows: ``S`` slots of one layer.
        positions: ``int32 [B, T]``.
        scale: Softmax scale applied to attention scores.
        q: Queries ``[B, T, N, Hn]``, for their shape and dtype.
        width: Width of the values.

    Returns:
        ``float32 [B, T, N, width]``.
    """
    if rows.num_slots <= 2 * KEY_BLOCK:
        scores, values = score(rows)
        scores = _apply_causal_mask(scores * scale, positions, 0)
        weights = jax.nn.softmax(scores, axis=-1)
        return _weighted_values(weights.astype(q.dtype), values)
    return _blockwise_attention(score, rows, positions, scale, q, width)


def _blockwise_attention(
    score: _ScoreFn, rows: LayerCache, positions: jax.Array, scale: float, q: jax.Array, width: int
) -> jax.Array:
    """:func:`_softmax_attention` with a running softmax over blocks of :data:`KEY_BLOCK` slots."""
    batch, length, heads, _ = q.shape
    blocks = -(-rows.num_slots // KEY_BLOCK)
    rows = rows.pad_slots(blocks * KEY_BLOCK)
    last = jnp.max(positions)

    def attend_block(state: _SoftmaxState, i: jax.Array) -> _SoftmaxState:
        row_max, row_sum, acc = state
        scores, values = score(rows.slice_slots(i * KEY_BLOCK, KEY_BLOCK))
        scores = _apply_causal_mask(scores * scale, positions, i * KEY_BLOCK)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=-1))
        weights, rescale = jnp.exp(scores - new_max[..., None]), jnp.exp(row_max - new_max)
        row_sum = row_sum * rescale + jnp.sum(weights, axis=-1)
        acc = acc * jnp.moveaxis(rescale, 1, 2)[..., None] + _weighted_values(weights.astype(q.dtype), values)
        return new_max, row_sum, acc

    def step(state: _SoftmaxState, i: jax.Array) -> tuple[_SoftmaxState, None]:
        # Blocks past the newest token are not read.
        return jax.lax.cond(i * KEY_BLOCK <= last, attend_block, lambda c, _: c, state, i), None

    shape = (batch, heads, length)
    row_max, row_sum = jnp.full(shape, _MASK_VALUE, jnp.float32), jnp.zeros(shape, jnp.float32)
    acc = jnp.zeros((batch, length, heads, width), jnp.float32)
    start = (vary_like(row_max, q), vary_like(row_sum, q), vary_like(acc, q))
    (_, row_sum, acc), _ = jax.lax.scan(step, start, jnp.arange(blocks, dtype=jnp.int32))
    return acc / jnp.moveaxis(row_sum, 1, 2)[..., None]


def _apply_causal_mask(scores: jax.Array, positions: jax.Array, first_slot: Index) -> jax.Array:
    slots = first_slot + jnp.arange(scores.shape[-1], dtype=jnp.int32)
    visible = slots[None, None, :] <= positions[:, :, None]
    return jnp.where(visible[:, None], scores, _MASK_VALUE)


def _weighted_values(weights: jax.Array, values: jax.Array) -> jax.Array:
    if values.shape[2] == 1:  # one value per slot for all heads
        return einsum_f32("bnts,bsw->btnw", weights, values[:, :, 0])
    return einsum_f32("bnts,bsnw->btnw", weights, values)
