"""Temperature, min_p, top_k and top_p: the steps that restrict random sampling to likely tokens.

The steps work on *gaps*: the distance of a score below the highest score of its row, divided by the temperature. A gap
is never negative, the probability of a token is proportional to exp(-gap), and excluded tokens have a gap of +inf.
"""

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sampling.numerics import deterministic_sum, search_threshold
from glm_jax.sampling.state import SamplerState


def score_gaps(scores: jax.Array, temperature: jax.Array) -> jax.Array:
    """Distances below each row's maximum, in units of its temperature.

    Args:
        scores: ``float32 [B, V]``, without NaN or +inf.
        temperature: ``float32 [B]``; 0, which marks a greedy row, counts as 1.

    Returns:
        Gaps ``float32 [B, V]``; +inf where the score is -inf.
    """
    top = scores.max(-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return (top - scores) / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def apply_filters(scores: jax.Array, state: SamplerState) -> jax.Array:
    """Applies temperature, min_p, top_k and top_p: steps 6 to 9 of :mod:`glm_jax.sampling.sampler`.

    Each filter keeps the most likely token. It keeps either all or none of several equally likely tokens, so that they
    stay equally likely. top_k and top_p cost nothing when no row uses them.

    Args:
        scores: ``float32 [B, V]``, output of :func:`~glm_jax.sampling.penalties.process_logits`.
        state: Sampling state of the batch.

    Returns:
        Gaps ``float32 [B, V]``; +inf for excluded tokens.
    """
    gap = _apply_min_p(score_gaps(scores, state.temperature), state.min_p)
    gap = lax.cond(jnp.any(state.top_k > 0), _apply_top_k, lambda _, gap, __: gap, scores, gap, state.top_k)
    return lax.cond(jnp.any(state.top_p < 1), _apply_top_p, lambda gap, _: gap, gap, state.top_p)


def _apply_min_p(gap: jax.Array, min_p: jax.Array) -> jax.Array:
    """Keeps tokens whose probability is at least ``min_p`` times the highest one."""
    return jnp.where(gap <= -jnp.log(min_p)[:, None], gap, jnp.inf)


def _apply_top_k(scores: jax.Array, gap: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keeps the k highest scores, and all that equal the k-th.

    Compares scores and not gaps, because two different scores may round to the same gap.
    """
    depth = -scores
    count = jnp.where(top_k > 0, jnp.minimum(top_k, scores.shape[-1]), scores.shape[-1])

    def keeps_enough(max_depth: jax.Array) -> jax.Array:
        return (depth <= max_depth[:, None]).sum(-1, dtype=jnp.int32) >= count

    return jnp.where(depth <= search_threshold(keeps_enough, depth.min(-1))[:, None], gap, jnp.inf)


def _apply_top_p(gap: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps a token if the more likely ones have less than ``top_p`` of the probability that is left."""
    weight = jnp.exp(-gap)
    required = top_p * deterministic_sum(weight)

    def keeps_enough(max_gap: jax.Array) -> jax.Array:
        return deterministic_sum(jnp.where(gap <= max_gap[:, None], weight, 0.0)) >= required

    max_gap = jnp.where(top_p < 1, search_threshold(keeps_enough, gap.min(-1)), jnp.inf)
    return jnp.where(gap <= max_gap[:, None], gap, jnp.inf)
