"""Which tokens may be drawn at random.

Filters give *gaps*: how far a score lies below the highest one, divided by the temperature. A gap is never negative,
the probability of a token is proportional to exp(-gap), and a token that is dropped has a gap of infinity.
"""

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sampling.numerics import deterministic_sum, search_threshold
from glm_jax.sampling.state import SamplerState


def score_gaps(scores: jax.Array, temperature: jax.Array) -> jax.Array:
    """Float32 ``[B, V]`` gaps of float32 ``[B, V]`` scores; a temperature of 0 counts as 1."""
    top = scores.max(-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return (top - scores) / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def apply_filters(scores: jax.Array, state: SamplerState) -> jax.Array:
    """The gaps of float32 ``[B, V]`` scores after min_p, then top_k, then top_p: what is dropped is infinite.

    Each keeps the highest, and of equal tokens all or none, so that those stay equally likely. top_k and top_p cost
    nothing when no row uses them.
    """
    gap = score_gaps(scores, state.temperature)
    gap = jnp.where(gap <= -jnp.log(state.min_p)[:, None], gap, jnp.inf)
    gap = lax.cond(jnp.any(state.top_k > 0), _top_k, lambda _, gap, __: gap, scores, gap, state.top_k)
    return lax.cond(jnp.any(state.top_p < 1), _top_p, lambda gap, _: gap, gap, state.top_p)


def _top_k(scores: jax.Array, gap: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keeps the k highest, and whatever equals the lowest of them. Counted on scores: two of them may share a gap."""
    depth = -scores
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, scores.shape[-1]), scores.shape[-1])

    def enough(deepest: jax.Array) -> jax.Array:
        return (depth <= deepest[:, None]).sum(-1, dtype=jnp.int32) >= wanted

    return jnp.where(depth <= search_threshold(enough, depth.min(-1))[:, None], gap, jnp.inf)


def _top_p(gap: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps a token if those above it have less than p of the probability that is left."""
    weight = jnp.exp(-gap)
    wanted = top_p * deterministic_sum(weight)

    def enough(widest: jax.Array) -> jax.Array:
        return deterministic_sum(jnp.where(gap <= widest[:, None], weight, 0.0)) >= wanted

    widest = jnp.where(top_p < 1, search_threshold(enough, gap.min(-1)), jnp.inf)
    return jnp.where(gap <= widest[:, None], gap, jnp.inf)
