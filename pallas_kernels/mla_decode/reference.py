"""What the kernels of :mod:`pallas_kernels.mla_decode` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.op import AttentionDims, LatentCacheArrays, SplitKVPartials
from pallas_kernels.quant_matmul.op import SumSq
from pallas_kernels.quant_matmul.reference import inv_rms_ref
from pallas_kernels.tiles import Tiles, dequantize_tiles

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
    dtype: Any,
) -> tuple[jax.Array, LatentCacheArrays]:
    """See :func:`pallas_kernels.mla_decode.absorbed_q_proj`."""
    wide = a.astype(jnp.float32)
    latent_q, latent, key = jnp.split(wide, [dims.query_latent, dims.query_latent + dims.latent], axis=-1)
    latent_q = latent_q * inv_rms_ref(sum_sq[0], dims.query_latent, dims.eps)
    layer = layer_index[0]
    q = jnp.matmul(latent_q, dequantize_tiles(_select_layer(q_b, layer)).T, precision=_EXACT)
    nope, rope = jnp.split(q.reshape(-1, dims.heads, dims.nope + dims.rope), [dims.nope], axis=-1)
    absorbed = jnp.einsum("mnh,nrh->mnr", nope, dequantize_tiles(_select_layer(k_b, layer)), precision=_EXACT)
    cos, sin = (x.astype(jnp.float32) for x in cos_sin)
    turned = _apply_rope(rope, cos[:, None], sin[:, None], interleave=dims.interleave)
    latent = latent * inv_rms_ref(sum_sq[1], dims.latent, dims.eps)
    rows = jnp.concatenate([latent, _apply_rope(key, cos, sin, interleave=dims.interleave)], axis=-1)
    made = jnp.concatenate([absorbed, turned], axis=-1).astype(dtype)
    return made, _write_cache(dims, cache, rows.astype(dtype), layer_index[0] + cache_layer_offset, positions)


def flash_decode_ref(
    dims: AttentionDims,
    query: jax.Array,
    cache: LatentCacheArrays,
    layer_index: jax.Array,
    positions: jax.Array,
    *,
    cache_layer_offset: int = 0,
) -> SplitKVPartials:
    """See :func:`pallas_kernels.mla_decode.flash_decode`; one share."""
    rows, batch = _read_cache(dims, cache, layer_index[0] + cache_layer_offset), cache.batch_size
    wide = query.astype(jnp.float32).reshape(batch, -1, dims.heads, query.shape[-1])
    scores = jnp.einsum("btnw,bsw->btns", wide, rows, precision=_EXACT) * dims.softmax_scale
    slots = jnp.arange(rows.shape[1], dtype=jnp.int32)
    visible = slots[None, None] <= positions.reshape(batch, -1)[:, :, None]
    scores = jnp.where(visible[:, :, None], scores, -1e30)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    parts = jnp.einsum("btns,bsr->btnr", weights, rows[..., : dims.latent], precision=_EXACT)
    flat = (batch, 1, -1)
    sums, totals = parts.reshape(*flat, dims.latent), jnp.sum(weights, axis=-1).reshape(flat)
    return SplitKVPartials(sums, top.reshape(flat), totals, positions, rows.shape[1], 1)


def combine_v_proj_ref(
    dims: AttentionDims, partials: SplitKVPartials, layer_index: jax.Array, v_b: Tiles, *, dtype: Any
) -> jax.Array:
    """See :func:`pallas_kernels.mla_decode.combine_v_proj`."""
    latents = combine_splits_ref(partials).reshape(-1, dims.heads, dims.latent)
    out = jnp.einsum("mnr,nvr->mnv", latents, dequantize_tiles(_select_layer(v_b, layer_index[0])), precision=_EXACT)
    return out.reshape(out.shape[0], -1).astype(dtype)


def combine_splits_ref(partials: SplitKVPartials) -> jax.Array:
    """The shares of the attention put together, float32 ``[B, T * N, R]``."""
    there = _non_empty_splits(partials)[..., None]
    tops, totals = jnp.where(there, partials.row_max, -jnp.inf), jnp.where(there, partials.row_sum, 0.0)
    weights = jnp.exp(tops - jnp.max(tops, axis=1, keepdims=True))
    sums = jnp.where(there[..., None], partials.acc, 0.0) * weights[..., None]
    return jnp.sum(sums, axis=1) / jnp.sum(totals * weights, axis=1)[..., None]


def _gather_pages(rows: jax.Array, pages: jax.Array | None) -> jax.Array:
    """``[B, S, n]`` of a layer's rows."""
    return rows if pages is None else rows[pages].reshape(pages.shape[0], -1, rows.shape[-1])


def _non_empty_splits(partials: SplitKVPartials) -> jax.Array:
    """Which shares have rows at all, bool ``[B, shares]``."""
    batch, splits = partials.row_max.shape[:2]
    length = jnp.minimum(jnp.max(partials.positions.reshape(batch, -1), axis=1) + 1, partials.capacity)
    blocks = (length + splits * partials.block_size - 1) // (splits * partials.block_size)
    share = blocks * partials.block_size
    return jnp.arange(splits, dtype=jnp.int32)[None] * share[:, None] < length[:, None]


def _select_layer(weight: Tiles, layer: jax.Array) -> Tiles:
    return jax.tree.map(lambda array: array[layer], weight)


def _apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleave: bool) -> jax.Array:
    one, other = (x[..., 0::2], x[..., 1::2]) if interleave else jnp.split(x, 2, axis=-1)
    turned = one * cos - other * sin, one * sin + other * cos
    return jnp.stack(turned, axis=-1).reshape(x.shape) if interleave else jnp.concatenate(turned, axis=-1)


def _write_cache(
    dims: AttentionDims, cache: LatentCacheArrays, rows: jax.Array, layer: jax.Array, positions: jax.Array
) -> LatentCacheArrays:
    batch = cache.batch_size
    shaped = rows.reshape(batch, -1, rows.shape[-1])
    slots, whose = positions.reshape(batch, -1), jnp.arange(batch, dtype=jnp.int32)[:, None]
    where = (layer, whose, slots)
    if cache.page_table is not None:
        page = cache.data.shape[2]
        # Beyond the last page: past the end of the pool, where nothing is stored.
        in_page = jnp.where(slots < cache.capacity, cache.page_table[whose, slots // page], cache.data.shape[1])
        where = (layer, in_page, slots % page)
    if cache.scales is None:
        codes = cache.data.at[where].set(shaped.astype(cache.data.dtype), mode="drop")
        return LatentCacheArrays(codes, None, cache.page_table)
    largest, wide = _QMAX[cache.kind], shaped.astype(jnp.float32)
    parts = jnp.split(wide, [dims.latent], axis=-1)
    scales = jnp.stack([jnp.max(jnp.abs(part), axis=-1) for part in parts], axis=-1) / largest
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0.0, scales)
    units = jnp.where(scales == 0, 1.0, scales)
    coded = jnp.concatenate([part / units[..., i : i + 1] for i, part in enumerate(parts)], axis=-1)
    coded = jnp.clip(coded, -largest, largest)
    if cache.kind == "int8":
        codes = jnp.round(coded).astype(jnp.int8)
    else:
        codes = jax.lax.bitcast_convert_type(coded.astype(jnp.float8_e4m3fn), jnp.uint8)
    kept = cache.data.at[where].set(codes, mode="drop"), cache.scales.at[where].set(scales, mode="drop")
    return LatentCacheArrays(*kept, cache.page_table)


def _read_cache(dims: AttentionDims, cache: LatentCacheArrays, layer: jax.Array) -> jax.Array:
    codes = _gather_pages(cache.data[layer], cache.page_table)
    if cache.scales is None:
        return codes.astype(jnp.float32)
    if cache.kind == "fp8":
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    scales = _gather_pages(cache.scales[layer], cache.page_table)
    widths = (dims.latent, dims.rope)
    spread = [jnp.broadcast_to(scales[..., i : i + 1], (*scales.shape[:-1], n)) for i, n in enumerate(widths)]
    return codes.astype(jnp.float32) * jnp.concatenate(spread, axis=-1)
