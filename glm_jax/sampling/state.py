"""The rows of a batch as the device sees them."""

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
    """Sampling options of ``B`` rows, and what they have written.

    Every leaf has the rows first, so that one specification shards all of them and a row can be copied into a slot with
    ``jax.tree.map``. Which of the optional leaves exist is decided by :class:`SamplerFeatures`; ``K`` and ``M`` are
    powers of two, at least 8. Those, ``B``, ``V`` and the two static fields are what a step is compiled for.

    Attributes:
        temperature: float32 ``[B]``; 0 for a greedy row.
        top_k: int32 ``[B]``; 0 is off.
        top_p: float32 ``[B]``; 1 is off.
        min_p: float32 ``[B]``; 0 is off.
        repetition: float32 ``[B]``, the penalty of that name; 1 is off.
        presence: float32 ``[B]``.
        frequency: float32 ``[B]``.
        seeds: uint32 ``[B, 2]``, the high and the low half.
        stop_ids: int32 ``[B, M]``, filled up with -1.
        bias_ids: int32 ``[B, K]``, filled up with V, or None.
        bias_values: float32 ``[B, K]``, or None.
        counts: int32 ``[B, V]``, occurrences in the output so far, or None.
        in_prompt: bool ``[B, V]``, or None.
        valid_vocab: static; ids from here on do not exist in the tokenizer and are never drawn.
        unused_ids: static; ids below that do not exist either.
        features: static; what the rows were made to need.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
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
        """Rows that have written nothing yet, as uncommitted arrays.

        Args:
            params: one per row.
            seeds: one per row, in [0, 2**63); see :func:`glm_jax.sampling.completion_seeds`.
            prompt_ids: one per row; read by the repetition penalty.
            vocab_size: width of the logits.
            valid_vocab: ids from here on are unknown to the tokenizer; at most ``vocab_size``.
            unused_ids: ids below ``valid_vocab`` that it does not know, where its vocabulary has gaps.
            eos_ids: end a row unless it ignores them.
            features: at least what the rows need, which is the default.

        Raises:
            SamplingError: if an id is outside the vocabulary, or ``features`` does not cover the rows.
        """
        needed = SamplerFeatures.from_params(params)
        features = needed if features is None else features
        if not features.covers(needed):
            raise SamplingError(f"these rows need {needed}, which {features} does not cover")
        batch_arrays.check_batch(params, seeds, prompt_ids, vocab_size, valid_vocab)
        gaps = tuple(sorted({token for token in unused_ids if token < valid_vocab}))
        leaves: dict[str, np.ndarray | None] = {
            **batch_arrays.scalar_arrays(params),
            "seeds": batch_arrays.split_seeds(seeds),
            "stop_ids": batch_arrays.stop_id_array(params, eos_ids),
            **dict.fromkeys(("bias_ids", "bias_values", "counts", "in_prompt")),
        }
        if features.bias:
            leaves |= batch_arrays.bias_arrays(params, vocab_size)
        if features.penalties:
            leaves |= batch_arrays.penalty_arrays(prompt_ids, vocab_size)
        made = jax.tree.map(jnp.asarray, leaves)
        return cls(valid_vocab=valid_vocab, unused_ids=gaps, features=features, **made)


def valid_token_mask(state: SamplerState, like: jax.Array) -> jax.Array:
    """Bool, of the shape ``[B, V]`` of ``like``: the ids that the tokenizer has."""
    known = token_ids_like(like) < state.valid_vocab
    if not state.unused_ids:
        return known
    used = np.ones((1, like.shape[-1]), bool)
    used[0, list(state.unused_ids)] = False
    return known & jnp.broadcast_to(jnp.asarray(used), like.shape)


def update_state(state: SamplerState, tokens: jax.Array, active: jax.Array) -> SamplerState:
    """The state after ``tokens``, int32 ``[B]``, were written to the rows where ``active``, bool ``[B]``.

    Without penalties there is nothing to remember.
    """
    if state.counts is None:
        return state
    written = active[:, None] & (token_ids_like(state.counts) == tokens[:, None])
    return dataclasses.replace(state, counts=state.counts + written.astype(jnp.int32))


def is_stop(tokens: jax.Array, state: SamplerState) -> jax.Array:
    """Bool ``[B]``: whether each token, int32 ``[B]``, is one of its row's stop or end-of-sequence ids."""
    return (state.stop_ids == tokens[:, None]).any(-1)
