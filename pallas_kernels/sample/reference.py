"""The sampling operations in plain JAX: filters by a sort of the whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.reference import fused_linear_ref
from pallas_kernels.quant_matmul.types import SumSq
from pallas_kernels.sample.types import SampleOutput, SamplingTensors, Vocabulary
from pallas_kernels.tiles import Tiles

_MAX_FLOAT = float(jnp.finfo(jnp.float32).max)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def lm_head_sample_ref(
    x: jax.Array,
    weight: Tiles,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    *,
    has_random: bool,
    sum_sq: SumSq | None = None,
    eps: float = 0.0,
) -> tuple[SampleOutput, jax.Array]:
    """Reference of :func:`pallas_kernels.sample.lm_head_sample`."""
    stack, layer = jax.tree.map(lambda array: array[None], weight), jnp.zeros(1, jnp.int32)
    linear, counters = fused_linear_ref(x, stack, layer, counters, sum_sq=sum_sq, eps=eps, dtype=jnp.float32)
    return sample_logits_ref(linear.out, sampling, vocabulary, counters, has_random=has_random, has_filters=False)


def sample_logits_ref(
    scores: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    *,
    has_random: bool,
    has_filters: bool,
    return_logprob: bool = False,
    logits: jax.Array | None = None,
) -> tuple[SampleOutput, jax.Array]:
    """Reference of :func:`pallas_kernels.sample.sample_logits`."""
    logits = scores if logits is None else logits
    valid = jnp.asarray(vocabulary.valid_mask(scores.shape[1]))[None]
    keys = jnp.where(valid, _clamp_finite(scores), -jnp.inf)
    if has_random:
        gaps = scaled_gaps_ref(keys, sampling)
        if has_filters:
            gaps = jnp.where(filter_mask_ref(keys, sampling), gaps, jnp.inf)
        noise = gumbel_noise_ref(sampling.seeds, sampling.positions, scores.shape[1])
        keys = jnp.where(valid & (sampling.temperature[:, None] > 0), noise - gaps, keys)
    best = keys.max(axis=1, keepdims=True)
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.where(valid & (keys == best), ids, scores.shape[1]).min(axis=1)
    is_broken = (valid & (jnp.isnan(logits) | (logits == jnp.inf))).any(axis=1)
    logprob = None
    if return_logprob:
        logprobs = jax.nn.log_softmax(_clamp_finite(logits), axis=1)
        logprob = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return SampleOutput(tokens, ~is_broken & (best[:, 0] > -jnp.inf), logprob), counters


def filter_thresholds_ref(
    scores: jax.Array, sampling: SamplingTensors, vocabulary: Vocabulary, counters: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Reference of :func:`pallas_kernels.sample.filter_thresholds`."""
    valid = jnp.asarray(vocabulary.valid_mask(scores.shape[1]))[None]
    scores = jnp.where(valid, _clamp_finite(scores), -jnp.inf)
    has_top_k, has_top_p = sampling.top_k > 0, sampling.top_p < 1
    by_top_k = _lowest_rank(scores, _top_k_mask(scores, sampling))
    by_top_p = _lowest_rank(scores, filter_mask_ref(scores, sampling))
    first = jnp.where(has_top_k, by_top_k, jnp.where(has_top_p, by_top_p, jnp.uint32(0)))
    return (first, jnp.where(has_top_k & has_top_p, by_top_p, jnp.uint32(0))), counters


def scaled_gaps_ref(scores: jax.Array, sampling: SamplingTensors) -> jax.Array:
    """Returns how far scores are below the highest of their row in units of its temperature, ``float32 [M, V]``."""
    top = scores.max(axis=1, keepdims=True)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    return (top - scores) / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]


def filter_mask_ref(scores: jax.Array, sampling: SamplingTensors) -> jax.Array:
    """Returns which scores remain after min_p, then top_k, then top_p, ``bool [M, V]``."""
    gaps = scaled_gaps_ref(scores, sampling)
    mask = (gaps <= -jnp.log(sampling.min_p)[:, None]) & _top_k_mask(scores, sampling)
    weights = jnp.where(mask, jnp.exp(-gaps), 0.0)
    order = jnp.argsort(-scores, axis=1)
    descending = jnp.take_along_axis(scores, order, axis=1)
    mass = jnp.cumsum(jnp.take_along_axis(weights, order, axis=1), axis=1)
    # The probability of all scores above: that of the sorted scores before the first equal one.
    first_equal = jax.vmap(lambda row, x: jnp.searchsorted(-row, -x))(descending, scores)
    above = jnp.take_along_axis(jnp.pad(mass, ((0, 0), (1, 0))), first_equal, axis=1)
    return mask & ((sampling.top_p[:, None] >= 1) | (above < sampling.top_p[:, None] * mass[:, -1:]))


def _top_k_mask(scores: jax.Array, sampling: SamplingTensors) -> jax.Array:
    """Returns which scores have fewer than top_k scores above them, ``bool [M, V]``."""
    descending = -jnp.sort(-scores, axis=1)
    above = jax.vmap(lambda row, x: jnp.searchsorted(-row, -x))(descending, scores)
    return (sampling.top_k[:, None] <= 0) | (above < sampling.top_k[:, None])


def _lowest_rank(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the lowest score in a mask as ``uint32 [M]`` in the order of the scores."""
    lowest = jnp.min(jnp.where(mask, scores, jnp.inf), axis=1)
    bits = jax.lax.bitcast_convert_type(lowest, jnp.uint32)
    return jnp.where(bits >> 31 != 0, ~bits, bits ^ jnp.uint32(1 << 31))


def gumbel_noise_ref(seeds: jax.Array, positions: jax.Array, width: int) -> jax.Array:
    """Returns standard Gumbel noise ``float32 [M, width]``, a function of (seed, next position, id).

    It comes from Threefry-2x32-20: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        seeds: ``uint32 [M, 2]``, the high and the low half of each seed.
        positions: ``int32 [M]``, positions of the newest tokens.
        width: Number of ids.
    """
    keys = (seeds[:, :1], seeds[:, 1:], seeds[:, :1] ^ seeds[:, 1:] ^ jnp.uint32(_PARITY))
    x = (positions + 1).astype(jnp.uint32)[:, None] + keys[0]
    y = jnp.arange(width, dtype=jnp.uint32)[None] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    uniform = x.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24)))


def _clamp_finite(logits: jax.Array) -> jax.Array:
    """Returns NaN as -inf and +inf as the largest float."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _MAX_FLOAT))
