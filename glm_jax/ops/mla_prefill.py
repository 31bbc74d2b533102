"""Attention of prompts in a kernel, in the expanded form (see :mod:`glm_jax.ops.mla`).

Keys and values of the heads are expanded from the cached latents for one KV chunk at a time, and the kernel's results
for the chunks are merged in float32. So the memory it takes depends on the size of a chunk alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glm_jax.cache.latent import LatentCache, LayerCache
from glm_jax.config import Config
from glm_jax.ops.linear import Index
from pallas_kernels.mla_prefill import flash_attention, merge_attn_states

# Most slots that are expanded at a time, for one row of the batch and for all rows together.
KV_CHUNK, KV_CHUNK_ALL_ROWS = 4096, 16_384
SHORT_CONTEXT = 1024  # slots expanded for a short context in a large cache
_MIN_KV_CHUNK = 256
_AttnState: TypeAlias = tuple[jax.Array, jax.Array]  # attention output and the logarithm of its softmax sum


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
        cfg: Config of the model.
        query: ``[B, T, N, Hn + P]``, the rotated rope part after the other.
        cache: The cache of all layers, with the new tokens written. The loop over chunks would copy a single layer.
        layer: Index in the cache.
        positions: ``int32 [B, T]``; a query sees slots up to its own position. Chunks above all of them are skipped.
        k_b: ``[N, Hn, R]``.
        v_b: ``[N, Hv, R]``.
        kv_chunk: Slots that are expanded at a time; by default a size that bounds the memory of all rows.
        short_context: Slots that are expanded if all positions are below this number.

    Returns:
        ``[B, T, N, Hv]`` in the dtype of the query.
    """
    matrices = (k_b.astype(query.dtype), v_b.astype(query.dtype))
    attend = functools.partial(_attend_chunk, cfg, query, cache, layer, positions, matrices)
    kv_chunk = kv_chunk or max(_MIN_KV_CHUNK, min(KV_CHUNK, KV_CHUNK_ALL_ROWS // query.shape[0]))
    last = jnp.max(positions)

    def one_chunk(length: int) -> jax.Array:
        return attend(jnp.int32(0), length, query.dtype)[0]

    def whole() -> jax.Array:
        if cache.capacity <= kv_chunk:
            return one_chunk(cache.capacity)
        return _merge_chunks(attend, cache.capacity, kv_chunk, last).astype(query.dtype)

    if cache.capacity <= short_context:
        return whole()
    return jax.lax.cond(last < short_context, lambda: one_chunk(short_context), whole)


def _merge_chunks(attend: Callable[..., _AttnState], slots: int, kv_chunk: int, last: jax.Array) -> jax.Array:
    """Attention over all chunks up to the position ``last``, in float32."""
    # The remainder comes first, so that all other chunks have one size and need no padding.
    first = slots % kv_chunk or kv_chunk

    def has_more(state: tuple[jax.Array, _AttnState]) -> jax.Array:
        start, _ = state
        return (start < slots) & (start <= last)

    def merge_next(state: tuple[jax.Array, _AttnState]) -> tuple[jax.Array, _AttnState]:
        start, merged = state
        return start + kv_chunk, merge_attn_states(merged, attend(start, kv_chunk, jnp.float32))

    start = (jnp.int32(first), attend(jnp.int32(0), first, jnp.float32))
    _, (out, _) = jax.lax.while_loop(has_more, merge_next, start)
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
    dtype: DTypeLike,
) -> _AttnState:
    """Attention over ``length`` slots from ``start`` on, and the logarithm of its softmax sum."""

    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (layer, 0, start, 0), (1, x.shape[1], length, x.shape[3]))[0]

    rows = LayerCache(cut(cache.data), None if cache.scales is None else cut(cache.scales), cache.dequant_dtype)
    values = rows.dequantize(cfg.kv_lora_rank, query.dtype).astype(query.dtype)
    latent, rope = jnp.split(values, [cfg.kv_lora_rank], axis=-1)
    # Without the barrier XLA merges two products that share an operand, and then copies the halves out of the result.
    latent_copy = jax.lax.optimization_barrier(latent)
    keys, expanded = _expand_heads(latent, matrices[0]), _expand_heads(latent_copy, matrices[1])
    return flash_attention(
        query, keys, rope, expanded, positions, start[None], scale=cfg.qk_head_dim**-0.5, dtype=dtype
    )


def _expand_heads(latent: jax.Array, matrix: jax.Array) -> jax.Array:
    """Latents ``[B, S, R]`` to keys or values ``[B, S, N, H]`` in the same dtype, accumulated in float32."""
    # Without HIGHEST a GPU would round float32 operands to TF32.
    precision = jax.lax.Precision.HIGHEST if latent.dtype == jnp.float32 else None
    return jnp.einsum("bsr,nhr->bsnh", latent, matrix, precision=precision, preferred_element_type=latent.dtype)
