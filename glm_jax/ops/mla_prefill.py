"""Attention of prompts by a kernel, in the expanded form (see :mod:`glm_jax.ops.mla`).

Keys and values of the heads are computed from the cached latents for one stretch of the context at a time, and what the
kernel gives for the stretches is put together in float32. So the memory it takes depends on the stretch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache, LayerCache
from glm_jax.config import Config
from glm_jax.ops.linear import Index
from pallas_kernels.mla_prefill import flash_attention, merge_attn_states

# Slots that are expanded at a time: of one row of the batch at most, and of all rows together.
KV_CHUNK, KV_CHUNK_ALL_ROWS = 4096, 16_384
# Slots of a context that is short, however large the cache.
SHORT_CONTEXT = 1024
_MIN_KV_CHUNK = 256


def prefill_attention(
    cfg: Config,
    query: jax.Array,
    cache: LatentCache,
    layer: Index,
    positions: jax.Array,
    k_b: jax.Array,
    v_b: jax.Array,
    *,
    kv_chunk: int | None = None,
    short_context: int = SHORT_CONTEXT,
) -> jax.Array:
    """Causal attention of many new tokens over a layer of the cache; :func:`glm_jax.ops.mla.mla_attention` for a GPU.

    Args:
        cfg: the model.
        query: ``[B, T, N, Hn + P]``, the rope part behind the other, and rotated.
        cache: of all layers, with the new tokens in it. Of a layer that was taken out before, the loop over stretches
            would need a copy.
        layer: index in the cache.
        positions: int32 ``[B, T]``; a query sees slots up to its own position. Stretches above all of them are not
            read.
        k_b: ``[N, Hn, R]``.
        v_b: ``[N, Hv, R]``.
        kv_chunk: slots that are expanded at a time; chosen unless given.
        short_context: slots that are expanded if all positions are below.

    Returns:
        ``[B, T, N, Hv]`` in the dtype of the query.
    """
    matrices = (k_b.astype(query.dtype), v_b.astype(query.dtype))
    run = functools.partial(_attend_chunk, cfg, query, cache, layer, positions, matrices)
    kv_chunk = kv_chunk or max(_MIN_KV_CHUNK, min(KV_CHUNK, KV_CHUNK_ALL_ROWS // query.shape[0]))
    last = jnp.max(positions)

    def alone(length: int) -> jax.Array:
        return run(jnp.int32(0), length, query.dtype)[0]

    def whole() -> jax.Array:
        if cache.capacity <= kv_chunk:
            return alone(cache.capacity)
        return _merge_chunks(run, cache.capacity, kv_chunk, last).astype(query.dtype)

    if cache.capacity <= short_context:
        return whole()
    return jax.lax.cond(last < short_context, lambda: alone(short_context), whole)


def _merge_chunks(run: Callable[..., Any], slots: int, stretch: int, last: jax.Array) -> jax.Array:
    """The results over all stretches up to a position as one, float32."""
    # What does not fill a stretch comes first, so that all others have one size and nothing need be padded.
    first = slots % stretch or stretch

    def more(state: Any) -> jax.Array:
        start, _ = state
        return (start < slots) & (start <= last)

    def further(state: Any) -> Any:
        start, before = state
        return start + stretch, merge_attn_states(before, run(start, stretch, jnp.float32))

    _, (out, _) = jax.lax.while_loop(more, further, (jnp.int32(first), run(jnp.int32(0), first, jnp.float32)))
    return out


def _attend_chunk(
    cfg: Config,
    query: jax.Array,
    cache: LatentCache,
    layer: Index,
    positions: jax.Array,
    matrices: tuple[jax.Array, jax.Array],
    start: jax.Array,
    length: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention over ``length`` slots from ``start`` on, and the logarithms of its sums."""

    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (layer, 0, start, 0), (1, x.shape[1], length, x.shape[3]))[0]

    rows = LayerCache(cut(cache.data), None if cache.scales is None else cut(cache.scales), cache.dequant_dtype)
    values = rows.dequantize(cfg.kv_lora_rank, query.dtype).astype(query.dtype)
    latent, rope = jnp.split(values, [cfg.kv_lora_rank], axis=-1)
    # XLA makes one product of two that share an operand, and then copies its halves out of it.
    again = jax.lax.optimization_barrier(latent)
    keys, expanded = _expand_heads(latent, matrices[0]), _expand_heads(again, matrices[1])
    return flash_attention(
        query, keys, rope, expanded, positions, start[None], scale=cfg.qk_head_dim**-0.5, dtype=dtype
    )


def _expand_heads(latent: jax.Array, matrix: jax.Array) -> jax.Array:
    """``[B, S, N, H]`` in the dtype of the latents ``[B, S, R]``, summed in float32."""
    # Without it a GPU would round float32 operands to TF32.
    precision = jax.lax.Precision.HIGHEST if latent.dtype == jnp.float32 else None
    return jnp.einsum("bsr,nhr->bsnh", latent, matrix, precision=precision, preferred_element_type=latent.dtype)
