"""The steps that change scores before the temperature: they act on greedy rows too."""

import jax
import jax.numpy as jnp

from glm_jax.sampling.state import SamplerState, valid_token_mask

_LARGEST = float(jnp.finfo(jnp.float32).max)


def clamp_non_finite(logits: jax.Array) -> jax.Array:
    """NaN as -inf, and +inf as the largest float, so that every later step stays defined."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _LARGEST))


def process_logits(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Float32 ``[B, V]`` scores: biased, penalized, without NaN or +inf, and -inf for ids that do not exist.

    The ids are masked last: nothing brings back -inf, so the place makes no difference to them.
    """
    return jnp.where(
        valid_token_mask(state, logits), clamp_non_finite(apply_bias_and_penalties(logits, state)), -jnp.inf
    )


def apply_bias_and_penalties(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Float32 ``[B, V]``, biased and penalized; the logits themselves where no row asks for it."""
    if state.bias_ids is not None and state.bias_values is not None:
        logits = _apply_logit_bias(logits, state.bias_ids, state.bias_values)
    if state.counts is not None and state.in_prompt is not None:
        logits = _apply_penalties(logits, state, state.counts, state.in_prompt)
    return logits


def _apply_logit_bias(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    blank = jnp.zeros(logits.shape[-1:], jnp.float32)
    # Scattered by row into zeros, not into the logits: that is right whatever way those are sharded.
    return logits + jax.vmap(lambda where, bias: blank.at[where].add(bias, mode="drop"))(ids, values)


def _apply_penalties(logits: jax.Array, state: SamplerState, counts: jax.Array, in_prompt: jax.Array) -> jax.Array:
    written = counts > 0
    penalty = jnp.where(written | in_prompt, state.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = logits - state.frequency[:, None] * counts.astype(jnp.float32)
    return logits - state.presence[:, None] * written.astype(jnp.float32)
