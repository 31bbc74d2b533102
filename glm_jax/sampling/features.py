"""What a batch needs of the sampler: the part that is compiled in. Host only: this module imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from glm_jax.sampling.params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplerFeatures:
    """The static part of :class:`~glm_jax.sampling.SamplerState`: each combination is a compilation of its own.

    One that covers the batch gives the same tokens as the smallest that does, only slower, so a server can fix one for
    all it will see and compile once. Which of top_k and top_p runs is decided on the device.

    Attributes:
        penalties: some row has a penalty; the state then holds ``[B, V]`` counts.
        filters: some row that is drawn at random uses top_k, top_p or min_p.
        bias: some row has a logit bias.
        logprobs: None, or how many most likely tokens are reported beside the chosen one.
        greedy_only: no row is drawn at random; no noise is made.
    """

    penalties: bool = False
    filters: bool = False
    bias: bool = False
    logprobs: int | None = None
    greedy_only: bool = False

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams]) -> SamplerFeatures:
        """The least that these rows need."""
        return cls(
            penalties=any(p.penalized for p in params),
            filters=any(p.filtered for p in params),
            bias=any(p.logit_bias for p in params),
            logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            greedy_only=all(p.greedy for p in params),
        )

    def covers(self, other: SamplerFeatures) -> bool:
        """Whether a batch that needs ``other`` can run with this."""
        return (
            self.penalties >= other.penalties
            and self.filters >= other.filters
            and self.bias >= other.bias
            and self.greedy_only <= other.greedy_only
            and (-1 if self.logprobs is None else self.logprobs) >= (-1 if other.logprobs is None else other.logprobs)
        )
