"""What the kernels of :mod:`pallas_kernels.sample` must compute: every pair of ids compared, nothing searched for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.op import Squares
from pallas_kernels.quant_matmul.reference import linear_ref
from pallas_kernels.sample.op import Drawn, Rows, Vocabulary
from pallas_kernels.tiles import Tiles

_LARGEST = float(jnp.finfo(jnp.float32).max)


def head_ref(
    x: jax.Array,
    weight: Tiles,
    rows: Rows,
    vocabulary: Vocabulary,
    noise: jax.Array,
    *,
    squares: Squares | None = None,
    eps: float = 0.0,
) -> Drawn:
    """See :func:`pallas_kernels.sample.head`; ``noise`` is float32 ``[M, V]``."""
    stack = jax.tree.map(lambda array: array[None], weight)
    made = linear_ref(x, stack, jnp.zeros(1, jnp.int32), squares=squares, eps=eps, dtype=jnp.float32)
    return draw_ref(made.out, rows, vocabulary, noise, filters=False)


def draw_ref(
    scores: jax.Array,
    rows: Rows,
    vocabulary: Vocabulary,
    noise: jax.Array,
    *,
    filters: bool,
    logits: jax.Array | None = None,
) -> Drawn:
    """See :func:`pallas_kernels.sample.draw`; ``noise`` is float32 ``[M, V]``. Always with log-probabilities."""
    logits = scores if logits is None else logits
    there = jnp.asarray(vocabulary.there(scores.shape[1]))[None]
    scores = jnp.where(there, _bounded(scores), -jnp.inf)
    gap = gaps_ref(scores, rows)
    if filters:
        gap = jnp.where(kept_ref(scores, rows), gap, jnp.inf)
    keys = jnp.where(rows.temperature[:, None] > 0, noise - gap, scores)
    keys = jnp.where(there, keys, -jnp.inf)
    best = keys.max(axis=1, keepdims=True)
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.where(there & (keys == best), ids, scores.shape[1]).min(axis=1)
    broken = (there & (jnp.isnan(logits) | (logits == jnp.inf))).any(axis=1)
    logprobs = jax.nn.log_softmax(_bounded(logits), axis=1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return Drawn(tokens, ~broken & (best[:, 0] > -jnp.inf), chosen)


def gaps_ref(scores: jax.Array, rows: Rows) -> jax.Array:
    """How far scores ``[M, V]`` lie below their row's highest, in units of its temperature."""
    top = scores.max(axis=1, keepdims=True)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    return (top - scores) / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]


def kept_ref(scores: jax.Array, rows: Rows) -> jax.Array:
    """Bool ``[M, V]``: what min_p, then top_k, then top_p leave of scores; memory grows with V squared."""
    gap = gaps_ref(scores, rows)
    left = gap <= -jnp.log(rows.min_p)[:, None]
    above = (scores[:, None, :] > scores[:, :, None]).sum(axis=2)
    left &= (rows.top_k[:, None] <= 0) | (above < rows.top_k[:, None])
    weight = jnp.where(left, jnp.exp(-gap), 0.0)
    mass = jnp.where(gap[:, None, :] < gap[:, :, None], weight[:, None, :], 0.0).sum(axis=2)
    wanted = rows.top_p[:, None] * weight.sum(axis=1, keepdims=True)
    return left & ((rows.top_p[:, None] >= 1) | (mass < wanted))


def _bounded(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _LARGEST))
