"""Sampling parameters as arrays, the vocabulary, and the sampled tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTensors:
    """Sampling parameters of M rows.

    Attributes:
        temperature: ``float32 [M]``; 0 takes the highest score, and has no filters.
        top_k: ``int32 [M]``; 0 is off.
        top_p: ``float32 [M]``; 1 is off.
        min_p: ``float32 [M]``; 0 is off.
        seeds: ``uint32 [M, 2]``, the high and the low half of each seed.
        positions: ``int32 [M]``, positions of the newest tokens; the sampled tokens have the next ones.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seeds: jax.Array
    positions: jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VocabLayout:
    """The static part of a vocabulary, as one constexpr of a kernel.

    Attributes:
        width: V, ids in a row of logits.
        valid_size: Ids from here on are invalid.
        has_unused_ids: Whether ids below may be invalid too.
    """

    width: int
    valid_size: int
    has_unused_ids: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that can be sampled.

    Attributes:
        valid_size: Ids from here on cannot be sampled.
        unused_ids: Further ids that cannot be sampled.
    """

    valid_size: int
    unused_ids: tuple[int, ...] = ()

    def valid_mask(self, width: int) -> np.ndarray:
        """Returns which ids can be sampled, ``bool [width]``."""
        valid = np.arange(width) < self.valid_size
        valid[[token for token in self.unused_ids if token < width]] = False
        return valid

    def layout(self, width: int) -> VocabLayout:
        """Returns the static part of the vocabulary, for the kernels."""
        return VocabLayout(width=width, valid_size=min(self.valid_size, width), has_unused_ids=bool(self.unused_ids))

    def invalid_mask(self, width: int, placeholder: jax.Array) -> jax.Array:
        """Returns ``int8 [width]`` with 1 for invalid ids, or a placeholder if the kernels do not read it."""
        return jnp.asarray(~self.valid_mask(width), jnp.int8) if self.unused_ids else placeholder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SampleOutput:
    """Sampled tokens.

    Attributes:
        tokens: ``int32 [M]``.
        ok: ``bool [M]``; False if a logit is NaN or +inf, or no id can be sampled.
        logprob: ``float32 [M]``, log-probabilities of the tokens, or ``None``.
    """

    tokens: jax.Array
    ok: jax.Array
    logprob: jax.Array | None = None
