"""What the kernels of :mod:`pallas_kernels.mla_decode` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.op import Attention, Cache, Parts
from pallas_kernels.quant_matmul.op import Squares
from pallas_kernels.quant_matmul.reference import factor_ref
from pallas_kernels.tiles import Tiles, from_tiles

_EXACT = jax.lax.Precision.HIGHEST
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def queries_ref(
    att: Attention,
    a: jax.Array,
    squares: tuple[Squares, Squares],
    place: jax.Array,
    positions: jax.Array,
    table: jax.Array,
    q_b: Tiles,
    k_b: Tiles,
    cache: Cache,
    *,
    cache_from: int = 0,
    dtype: Any,
) -> tuple[jax.Array, Cache]:
    """See :func:`pallas_kernels.mla_decode.queries`."""
    wide = a.astype(jnp.float32)
    latent_q, latent, key = jnp.split(wide, [att.query_latent, att.query_latent + att.latent], axis=-1)
    latent_q = latent_q * factor_ref(squares[0], att.query_latent, att.eps)
    layer = place[0]
    q = jnp.matmul(latent_q, from_tiles(_at(q_b, layer)).T, precision=_EXACT)
    nope, rope = jnp.split(q.reshape(-1, att.heads, att.nope + att.rope), [att.nope], axis=-1)
    absorbed = jnp.einsum("mnh,nrh->mnr", nope, from_tiles(_at(k_b, layer)), precision=_EXACT)
    cos, sin = (x.astype(jnp.float32) for x in table)
    turned = _turn(rope, cos[:, None], sin[:, None], interleave=att.interleave)
    latent = latent * factor_ref(squares[1], att.latent, att.eps)
    rows = jnp.concatenate([latent, _turn(key, cos, sin, interleave=att.interleave)], axis=-1)
    made = jnp.concatenate([absorbed, turned], axis=-1).astype(dtype)
    return made, _written(att, cache, rows.astype(dtype), place[0] + cache_from, positions)


def attend_ref(
    att: Attention, query: jax.Array, cache: Cache, place: jax.Array, positions: jax.Array, *, cache_from: int = 0
) -> Parts:
    """See :func:`pallas_kernels.mla_decode.attend`; one share."""
    rows, batch = _read(att, cache, place[0] + cache_from), cache.batch
    wide = query.astype(jnp.float32).reshape(batch, -1, att.heads, query.shape[-1])
    scores = jnp.einsum("btnw,bsw->btns", wide, rows, precision=_EXACT) * att.scale
    slots = jnp.arange(rows.shape[1], dtype=jnp.int32)
    visible = slots[None, None] <= positions.reshape(batch, -1)[:, :, None]
    scores = jnp.where(visible[:, :, None], scores, -1e30)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    parts = jnp.einsum("btns,bsr->btnr", weights, rows[..., : att.latent], precision=_EXACT)
    flat = (batch, 1, -1)
    sums, totals = parts.reshape(*flat, att.latent), jnp.sum(weights, axis=-1).reshape(flat)
    return Parts(sums, top.reshape(flat), totals, positions, rows.shape[1], 1)


def values_ref(att: Attention, parts: Parts, place: jax.Array, v_b: Tiles, *, dtype: Any) -> jax.Array:
    """See :func:`pallas_kernels.mla_decode.values`."""
    latents = latents_ref(parts).reshape(-1, att.heads, att.latent)
    out = jnp.einsum("mnr,nvr->mnv", latents, from_tiles(_at(v_b, place[0])), precision=_EXACT)
    return out.reshape(out.shape[0], -1).astype(dtype)


def latents_ref(parts: Parts) -> jax.Array:
    """The shares of the attention put together, float32 ``[B, T * N, R]``."""
    there = _there(parts)[..., None]
    tops, totals = jnp.where(there, parts.tops, -jnp.inf), jnp.where(there, parts.totals, 0.0)
    weights = jnp.exp(tops - jnp.max(tops, axis=1, keepdims=True))
    sums = jnp.where(there[..., None], parts.sums, 0.0) * weights[..., None]
    return jnp.sum(sums, axis=1) / jnp.sum(totals * weights, axis=1)[..., None]


def _in_one_piece(rows: jax.Array, pages: jax.Array | None) -> jax.Array:
    """``[B, S, n]`` of a layer's rows."""
    return rows if pages is None else rows[pages].reshape(pages.shape[0], -1, rows.shape[-1])


def _there(parts: Parts) -> jax.Array:
    """Which shares have rows at all, bool ``[B, shares]``."""
    batch, splits = parts.tops.shape[:2]
    length = jnp.minimum(jnp.max(parts.positions.reshape(batch, -1), axis=1) + 1, parts.slots)
    blocks = (length + splits * parts.block - 1) // (splits * parts.block)
    share = blocks * parts.block
    return jnp.arange(splits, dtype=jnp.int32)[None] * share[:, None] < length[:, None]


def _at(weight: Tiles, layer: jax.Array) -> Tiles:
    return jax.tree.map(lambda array: array[layer], weight)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleave: bool) -> jax.Array:
    one, other = (x[..., 0::2], x[..., 1::2]) if interleave else jnp.split(x, 2, axis=-1)
    turned = one * cos - other * sin, one * sin + other * cos
    return jnp.stack(turned, axis=-1).reshape(x.shape) if interleave else jnp.concatenate(turned, axis=-1)


def _written(att: Attention, cache: Cache, rows: jax.Array, layer: jax.Array, positions: jax.Array) -> Cache:
    batch = cache.batch
    shaped = rows.reshape(batch, -1, rows.shape[-1])
    slots, whose = positions.reshape(batch, -1), jnp.arange(batch, dtype=jnp.int32)[:, None]
    where = (layer, whose, slots)
    if cache.pages is not None:
        page = cache.codes.shape[2]
        # Beyond the last page: past the end of the pool, where nothing is stored.
        in_page = jnp.where(slots < cache.slots, cache.pages[whose, slots // page], cache.codes.shape[1])
        where = (layer, in_page, slots % page)
    if cache.scales is None:
        codes = cache.codes.at[where].set(shaped.astype(cache.codes.dtype), mode="drop")
        return Cache(codes, None, cache.pages)
    largest, wide = _LARGEST[cache.kind], shaped.astype(jnp.float32)
    parts = jnp.split(wide, [att.latent], axis=-1)
    scales = jnp.stack([jnp.max(jnp.abs(part), axis=-1) for part in parts], axis=-1) / largest
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0.0, scales)
    units = jnp.where(scales == 0, 1.0, scales)
    coded = jnp.concatenate([part / units[..., i : i + 1] for i, part in enumerate(parts)], axis=-1)
    coded = jnp.clip(coded, -largest, largest)
    if cache.kind == "int8":
        codes = jnp.round(coded).astype(jnp.int8)
    else:
        codes = jax.lax.bitcast_convert_type(coded.astype(jnp.float8_e4m3fn), jnp.uint8)
    kept = cache.codes.at[where].set(codes, mode="drop"), cache.scales.at[where].set(scales, mode="drop")
    return Cache(*kept, cache.pages)


def _read(att: Attention, cache: Cache, layer: jax.Array) -> jax.Array:
    codes = _in_one_piece(cache.codes[layer], cache.pages)
    if cache.scales is None:
        return codes.astype(jnp.float32)
    if cache.kind == "fp8":
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    scales = _in_one_piece(cache.scales[layer], cache.pages)
    widths = (att.latent, att.rope)
    spread = [jnp.broadcast_to(scales[..., i : i + 1], (*scales.shape[:-1], n)) for i, n in enumerate(widths)]
    return codes.astype(jnp.float32) * jnp.concatenate(spread, axis=-1)
