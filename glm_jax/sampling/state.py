"""The sampling state of a batch on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.errors import SamplingError
from glm_jax.sampling import batch_arrays
from glm_jax.sampling.features import SamplerFeatures
from glm_jax.sampling.numerics import token_ids_like
from glm_jax.sampling.params import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplerState:
    """Sampling options of a batch of ``B`` rows, and the output tokens its penalties have counted.

    Every array has the rows as its first axis, so that one partition spec shards all of them and a row can be copied
    into a batch slot with ``jax.tree.map``. :class:`SamplerFeatures` decides which optional arrays exist. ``K`` and
    ``M`` are powers of two, at least 8. A sampling step is compiled for each combination of ``B``, ``V``, ``K``, ``M``
    and the static fields.

    Attributes:
        temperature: ``float32 [B]``; 0 marks a greedy row.
        top_k: ``int32 [B]``; 0 is off.
        top_p: ``float32 [B]``; 1 is off.
        min_p: ``float32 [B]``; 0 is off.
        repetition_penalty: ``float32 [B]``; 1 is off.
        presence_penalty: ``float32 [B]``; 0 is off.
        frequency_penalty: ``float32 [B]``; 0 is off.
        seeds: ``uint32 [B, 2]``, the high and the low half of each seed.
        stop_ids: ``int32 [B, M]``, padded with -1.
        bias_ids: ``int32 [B, K]``, padded with V; None without logit biases.
        bias_values: ``float32 [B, K]``; None without logit biases.
        counts: ``int32 [B, V]``, occurrences of each token in the output so far; None without penalties.
        in_prompt: ``bool [B, V]``, tokens that occur in the prompt; None without penalties.
        valid_vocab: Number of leading ids that the tokenizer may know; later ids are never sampled. Static.
        unused_ids: Ids below ``valid_vocab`` that the tokenizer does not know either. Static.
        features: Features that the state was created for. Static.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seeds: jax.Array
    stop_ids: jax.Array
    bias_ids: jax.Array | None
    bias_values: jax.Array | None
    counts: jax.Array | None
    in_prompt: jax.Array | None
    valid_vocab: int = dataclasses.field(metadata={"static": True})
    unused_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    features: SamplerFeatures = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompt_ids: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        valid_vocab: int,
        unused_ids: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
        features: SamplerFeatures | None = None,
    ) -> SamplerState:
        """Builds the state of rows without output tokens, as arrays that are not committed to a device.

        Args:
            params: Options of each row.
            seeds: Seed of each row, in [0, 2**63); see :func:`glm_jax.sampling.completion_seeds`.
            prompt_ids: Prompt of each row, read by the repetition penalty.
            vocab_size: Width ``V`` of the logits.
            valid_vocab: Number of leading ids that the tokenizer may know, at most ``vocab_size``.
            unused_ids: Ids below ``valid_vocab`` that the tokenizer does not know.
            eos_ids: End-of-sequence ids, which end a row unless it ignores them.
            features: Features to compile for; by default the smallest set that covers the rows.

        Raises:
            SamplingError: if an id is outside the vocabulary, or ``features`` does not cover the rows.
        """
        needed = SamplerFeatures.from_params(params)
        features = needed if features is None else features
        if not features.covers(needed):
            raise SamplingError(f"these rows need {needed}, which {features} does not cover")
        batch_arrays.check_batch(params, seeds, prompt_ids, vocab_size, valid_vocab)
        unused = tuple(sorted({token for token in unused_ids if token < valid_vocab}))
        arrays: dict[str, np.ndarray | None] = {
            **batch_arrays.scalar_arrays(params),
            "seeds": batch_arrays.split_seeds(seeds),
            "stop_ids": batch_arrays.stop_id_array(params, eos_ids),
            **dict.fromkeys(("bias_ids", "bias_values", "counts", "in_prompt")),
        }
        if features.bias:
            arrays |= batch_arrays.bias_arrays(params, vocab_size)
        if features.penalties:
            arrays |= batch_arrays.penalty_arrays(prompt_ids, vocab_size)
        return cls(valid_vocab=valid_vocab, unused_ids=unused, features=features, **jax.tree.map(jnp.asarray, arrays))


def valid_token_mask(state: SamplerState, like: jax.Array) -> jax.Array:
    """Marks the ids that the tokenizer knows: ``bool [B, V]``, the shape of ``like``."""
    known = token_ids_like(like) < state.valid_vocab
    if not state.unused_ids:
        return known
    is_used = np.ones((1, like.shape[-1]), bool)
    is_used[0, list(state.unused_ids)] = False
    return known & jnp.broadcast_to(jnp.asarray(is_used), like.shape)


def update_state(state: SamplerState, tokens: jax.Array, active: jax.Array) -> SamplerState:
    """Returns the state after appending ``tokens`` to the output of the active rows.

    Only the counts of the penalties change; without penalties the state is returned as it is.

    Args:
        state: Sampling state of ``B`` rows.
        tokens: ``int32 [B]``, newest token of each row.
        active: ``bool [B]``, rows that are still being generated.
    """
    if state.counts is None:
        return state
    is_new = active[:, None] & (token_ids_like(state.counts) == tokens[:, None])
    return dataclasses.replace(state, counts=state.counts + is_new.astype(jnp.int32))


def is_stop(tokens: jax.Array, state: SamplerState) -> jax.Array:
    """Whether each token ``int32 [B]`` is one of its row's stop or end-of-sequence ids, as ``bool [B]``."""
    return (state.stop_ids == tokens[:, None]).any(-1)
