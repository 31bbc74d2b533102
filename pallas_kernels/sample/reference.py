"""What the kernels of :mod:`pallas_kernels.sample` must compute: every pair of ids compared, nothing searched for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.op import SumSq
from pallas_kernels.quant_matmul.reference import fused_linear_ref
from pallas_kernels.sample.op import SampleOutput, SamplingTensors, Vocabulary
from pallas_kernels.tiles import Tiles

_MAX_FLOAT = float(jnp.finfo(jnp.float32).max)


def lm_head_sample_ref(
    x: jax.Array,
    weight: Tiles,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    noise: jax.Array,
    *,
    sum_sq: SumSq | None = None,
    eps: float = 0.0,
) -> SampleOutput:
    """See :func:`pallas_kernels.sample.lm_head_sample`; ``noise`` is float32 ``[M, V]``."""
    stack = jax.tree.map(lambda array: array[None], weight)
    made = fused_linear_ref(x, stack, jnp.zeros(1, jnp.int32), sum_sq=sum_sq, eps=eps, dtype=jnp.float32)
    return sample_logits_ref(made.out, sampling, vocabulary, noise, has_filters=False)


def sample_logits_ref(
    scores: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    noise: jax.Array,
    *,
    has_filters: bool,
    logits: jax.Array | None = None,
) -> SampleOutput:
    """See :func:`pallas_kernels.sample.sample_logits`; ``noise`` is float32 ``[M, V]``. Always with log-probabilities."""
    logits = scores if logits is None else logits
    there = jnp.asarray(vocabulary.valid_mask(scores.shape[1]))[None]
    scores = jnp.where(there, _clamp_finite(scores), -jnp.inf)
    gap = scaled_gaps_ref(scores, sampling)
    if has_filters:
        gap = jnp.where(filter_mask_ref(scores, sampling), gap, jnp.inf)
    keys = jnp.where(sampling.temperature[:, None] > 0, noise - gap, scores)
    keys = jnp.where(there, keys, -jnp.inf)
    best = keys.max(axis=1, keepdims=True)
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.where(there & (keys == best), ids, scores.shape[1]).min(axis=1)
    broken = (there & (jnp.isnan(logits) | (logits == jnp.inf))).any(axis=1)
    logprobs = jax.nn.log_softmax(_clamp_finite(logits), axis=1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return SampleOutput(tokens, ~broken & (best[:, 0] > -jnp.inf), chosen)


def scaled_gaps_ref(scores: jax.Array, sampling: SamplingTensors) -> jax.Array:
    """How far scores ``[M, V]`` lie below their row's highest, in units of its temperature."""
    top = scores.max(axis=1, keepdims=True)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    return (top - scores) / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]


def filter_mask_ref(scores: jax.Array, sampling: SamplingTensors) -> jax.Array:
    """Bool ``[M, V]``: what min_p, then top_k, then top_p leave of scores; memory grows with V squared."""
    gap = scaled_gaps_ref(scores, sampling)
    left = gap <= -jnp.log(sampling.min_p)[:, None]
    above = (scores[:, None, :] > scores[:, :, None]).sum(axis=2)
    left &= (sampling.top_k[:, None] <= 0) | (above < sampling.top_k[:, None])
    weight = jnp.where(left, jnp.exp(-gap), 0.0)
    mass = jnp.where(gap[:, None, :] < gap[:, :, None], weight[:, None, :], 0.0).sum(axis=2)
    wanted = sampling.top_p[:, None] * weight.sum(axis=1, keepdims=True)
    return left & ((sampling.top_p[:, None] >= 1) | (mass < wanted))


def _clamp_finite(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _MAX_FLOAT))
