"""The three operations of absorbed attention in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.mla_decode.types import AttentionDims, LatentCacheArrays, SplitKVPartials
from pallas_kernels.quant_matmul.reference import dequantize_layer, inv_rms_ref, matmul_ref
from pallas_kernels.quant_matmul.types import SumSq
from pallas_kernels.tiles import Tiles

_EXACT = jax.lax.Precision.HIGHEST
_QMAX = {"int8": 127.0, "fp8": 448.0}


def absorbed_q_proj_ref(
    dims: AttentionDims,
    a: jax.Array,
    sum_sq: tuple[SumSq, SumSq],
    layer_index: jax.Array,
    positions: jax.Array,
    cos_sin: jax.Array,
    q_b: Tiles,
    k_b: Tiles,
    cache: LatentCacheArrays,
    *,
    cache_layer_offset: int = 0,
    dtype: DTypeLike,
) -> tuple[jax.Array, LatentCacheArrays]:
    """Reference of :func:`pallas_kernels.mla_decode.absorbed_q_proj`."""
    layer, latents_end = layer_index[0], dims.query_latent + dims.latent
    query_latent, latent, rope_key = jnp.split(a.astype(jnp.float32), [dims.query_latent, latents_end], axis=-1)
    query_latent = query_latent * inv_rms_ref(sum_sq[0], dims.query_latent, dims.eps)
    q = matmul_ref(query_latent, q_b, layer)
    nope, rope = jnp.split(q.reshape(-1, dims.heads, dims.nope + dims.rope), [dims.nope], axis=-1)
    absorbed = jnp.einsum("mnh,nrh->mnr", nope, dequantize_layer(k_b, layer), precision=_EXACT)
    cos, sin = (x.astype(jnp.float32) for x in cos_sin)
    rotated = _apply_rope(rope, cos[:, None], sin[:, None], interleave=dims.interleave)
    latent = latent * inv_rms_ref(sum_sq[1], dims.latent, dims.eps)
    rows = jnp.concatenate([latent, _apply_rope(rope_key, cos, sin, interleave=dims.interleave)], axis=-1)
    queries = jnp.concatenate([absorbed, rotated], axis=-1).astype(dtype)
    return queries, _write_cache(dims, cache, rows.astype(dtype), layer + cache_layer_offset, positions)


def flash_decode_ref(
    dims: AttentionDims,
    query: jax.Array,
    cache: LatentCacheArrays,
    layer_index: jax.Array,
    positions: jax.Array,
    *,
    cache_layer_offset: int = 0,
) -> SplitKVPartials:
    """Reference of :func:`pallas_kernels.mla_decode.flash_decode`, in one split."""
    rows, batch = _read_cache(dims, cache, layer_index[0] + cache_layer_offset), cache.batch_size
    queries = query.astype(jnp.float32).reshape(batch, -1, dims.heads, query.shape[-1])
    scores = jnp.einsum("btnw,bsw->btns", queries, rows, precision=_EXACT) * dims.softmax_scale
    slots = jnp.arange(rows.shape[1], dtype=jnp.int32)
    visible = slots[None, None] <= positions.reshape(batch, -1)[:, :, None]
    scores = jnp.where(visible[:, :, None], scores, -1e30)
    row_max = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - row_max[..., None])
    acc = jnp.einsum("btns,bsr->btnr", weights, rows[..., : dims.latent], precision=_EXACT)
    one_split = (batch, 1, -1)
    acc, row_sum = acc.reshape(*one_split, dims.latent), jnp.sum(weights, axis=-1).reshape(one_split)
    return SplitKVPartials(acc, row_max.reshape(one_split), row_sum, positions, rows.shape[1], 1)


def combine_v_proj_ref(
    dims: AttentionDims, partials: SplitKVPartials, layer_index: jax.Array, v_b: Tiles, *, dtype: DTypeLike
) -> jax.Array:
    """Reference of :func:`pallas_kernels.mla_decode.combine_v_proj`."""
    latents = combine_splits_ref(partials).reshape(-1, dims.heads, dims.latent)
    out = jnp.einsum("mnr,nvr->mnv", latents, dequantize_layer(v_b, layer_index[0]), precision=_EXACT)
    return out.reshape(out.shape[0], -1).astype(dtype)


def combine_splits_ref(partials: SplitKVPartials) -> jax.Array:
    """Returns attention over all splits, ``float32 [B, T * N, R]``."""
    filled = _filled_splits(partials)[..., None]
    row_max = jnp.where(filled, partials.row_max, -jnp.inf)
    row_sum = jnp.where(filled, partials.row_sum, 0.0)
    weights = jnp.exp(row_max - jnp.max(row_max, axis=1, keepdims=True))
    acc = jnp.where(filled[..., None], partials.acc, 0.0) * weights[..., None]
    return jnp.sum(acc, axis=1) / jnp.sum(row_sum * weights, axis=1)[..., None]


def _gather_pages(rows: jax.Array, page_table: jax.Array | None) -> jax.Array:
    """Returns one layer of the cache as contiguous rows ``[B, S, n]``."""
    return rows if page_table is None else rows[page_table].reshape(page_table.shape[0], -1, rows.shape[-1])


def _filled_splits(partials: SplitKVPartials) -> jax.Array:
    """Returns which splits have rows, ``bool [B, splits]``."""
    batch, splits = partials.row_max.shape[:2]
    length = jnp.minimum(jnp.max(partials.positions.reshape(batch, -1), axis=1) + 1, partials.capacity)
    blocks = (length + splits * partials.block_size - 1) // (splits * partials.block_size)
    rows_per_split = blocks * partials.block_size
    return jnp.arange(splits, dtype=jnp.int32)[None] * rows_per_split[:, None] < length[:, None]


def _apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleave: bool) -> jax.Array:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else jnp.split(x, 2, axis=-1)
    rotated = first * cos - second * sin, first * sin + second * cos
    return jnp.stack(rotated, axis=-1).reshape(x.shape) if interleave else jnp.concatenate(rotated, axis=-1)


def _write_cache(
    dims: AttentionDims, cache: LatentCacheArrays, rows: jax.Array, layer: jax.Array, positions: jax.Array
) -> LatentCacheArrays:
    """Writes new rows ``[M, R + P]``; positions outside the cache are dropped."""
    batch = cache.batch_size
    values = rows.reshape(batch, -1, rows.shape[-1])
    index = _cache_index(cache, layer, positions.reshape(batch, -1))
    if cache.scales is None:
        data = cache.data.at[index].set(values.astype(cache.data.dtype), mode="drop")
        return LatentCacheArrays(data, None, cache.page_table)
    qvalues, scales = _quantize_rows(dims, cache.kind, values.astype(jnp.float32))
    data = cache.data.at[index].set(qvalues, mode="drop")
    return LatentCacheArrays(data, cache.scales.at[index].set(scales, mode="drop"), cache.page_table)


def _cache_index(cache: LatentCacheArrays, layer: jax.Array, slots: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the index of slots ``[B, T]`` in the arrays of the cache."""
    sequence = jnp.arange(cache.batch_size, dtype=jnp.int32)[:, None]
    if cache.page_table is None:
        return layer, sequence, slots
    page_size = cache.data.shape[2]
    # A slot past the last page gets the page past the end of the pool, where nothing is stored.
    page = jnp.where(slots < cache.capacity, cache.page_table[sequence, slots // page_size], cache.data.shape[1])
    return layer, page, slots % page_size


def _quantize_rows(dims: AttentionDims, kind: str, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes rows ``float32 [B, T, R + P]`` to 8 bits, with scales ``float32 [B, T, 2]``."""
    qmax = _QMAX[kind]
    parts = jnp.split(values, [dims.latent], axis=-1)
    scales = jnp.stack([jnp.max(jnp.abs(part), axis=-1) for part in parts], axis=-1) / qmax
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0.0, scales)
    units = jnp.where(scales == 0, 1.0, scales)
    scaled = jnp.concatenate([part / units[..., i : i + 1] for i, part in enumerate(parts)], axis=-1)
    scaled = jnp.clip(scaled, -qmax, qmax)
    if kind == "int8":
        return jnp.round(scaled).astype(jnp.int8), scales
    return jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8), scales


def _read_cache(dims: AttentionDims, cache: LatentCacheArrays, layer: jax.Array) -> jax.Array:
    """Returns one layer of the cache as ``float32 [B, S, R + P]``."""
    data = _gather_pages(cache.data[layer], cache.page_table)
    if cache.scales is None:
        return data.astype(jnp.float32)
    if cache.kind == "fp8":
        data = jax.lax.bitcast_convert_type(data, jnp.float8_e4m3fn)
    scales = _gather_pages(cache.scales[layer], cache.page_table)
    widths = (dims.latent, dims.rope)
    spread = [jnp.broadcast_to(scales[..., i : i + 1], (*scales.shape[:-1], n)) for i, n in enumerate(widths)]
    return data.astype(jnp.float32) * jnp.concatenate(spread, axis=-1)
