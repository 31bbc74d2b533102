"""The sampling features a batch uses, which select what is compiled. Host only: this module imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from glm_jax.sampling.params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplerFeatures:
    """The static part of :class:`~glm_jax.sampling.SamplerState`; each combination is compiled separately.

    Features that a batch does not use change no token and only cost time. A server can therefore fix one combination
    that covers all requests it accepts, and compile once. Whether top_k and top_p run is decided on the device.

    Attributes:
        penalties: Some row has a penalty; the state then holds token counts ``int32 [B, V]``.
        filters: Some row with a temperature uses top_k, top_p or min_p.
        bias: Some row has a logit bias.
        logprobs: Number of most likely tokens reported beside the chosen one; None reports no log-probabilities.
        greedy_only: Every row is greedy, so no noise is computed.
    """

    penalties: bool = False
    filters: bool = False
    bias: bool = False
    logprobs: int | None = None
    greedy_only: bool = False

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams]) -> SamplerFeatures:
        """The smallest set of features that covers a batch with these options."""
        return cls(
            penalties=any(p.penalized for p in params),
            filters=any(p.filtered for p in params),
            bias=any(p.logit_bias for p in params),
            logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            greedy_only=all(p.greedy for p in params),
        )

    def covers(self, other: SamplerFeatures) -> bool:
        """Whether a batch that needs the features ``other`` can run with these."""
        return (
            self.penalties >= other.penalties
            and self.filters >= other.filters
            and self.bias >= other.bias
            and self.greedy_only <= other.greedy_only
            and (-1 if self.logprobs is None else self.logprobs) >= (-1 if other.logprobs is None else other.logprobs)
        )
