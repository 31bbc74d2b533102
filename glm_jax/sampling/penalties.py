"""Logit bias and penalties: the steps before the temperature, which apply to greedy rows too."""

import jax
import jax.numpy as jnp

from glm_jax.sampling.state import SamplerState, valid_token_mask

_MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)


def clamp_non_finite(logits: jax.Array) -> jax.Array:
    """Replaces NaN by -inf and +inf by the largest float32, so that every later step stays defined."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _MAX_FLOAT32))


def process_logits(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Applies all steps before the temperature: steps 1 to 4 of :mod:`glm_jax.sampling.sampler`.

    Args:
        logits: ``float32 [B, V]``, output of the model.
        state: Sampling state of the batch.

    Returns:
        Scores ``float32 [B, V]`` without NaN or +inf; ids that the tokenizer does not know have -inf.
    """
    return jnp.where(
        valid_token_mask(state, logits), clamp_non_finite(apply_bias_and_penalties(logits, state)), -jnp.inf
    )


def apply_bias_and_penalties(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Applies logit bias and penalties to ``float32 [B, V]`` logits; returns them unchanged if no row uses any."""
    if state.bias_ids is not None and state.bias_values is not None:
        logits = _apply_logit_bias(logits, state.bias_ids, state.bias_values)
    if state.counts is not None and state.in_prompt is not None:
        logits = _apply_penalties(logits, state, state.counts, state.in_prompt)
    return logits


def _apply_logit_bias(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    blank = jnp.zeros(logits.shape[-1:], jnp.float32)
    # Biases are scattered into zeros and added, which is correct however the logits are sharded.
    return logits + jax.vmap(lambda row_ids, bias: blank.at[row_ids].add(bias, mode="drop"))(ids, values)


def _apply_penalties(logits: jax.Array, state: SamplerState, counts: jax.Array, in_prompt: jax.Array) -> jax.Array:
    in_output = counts > 0
    repetition = jnp.where(in_output | in_prompt, state.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - state.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return logits - state.presence_penalty[:, None] * in_output.astype(jnp.float32)
