"""From what a caller gives, prompts and options, to rows that can be run. Imports no JAX."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from glm_jax.engine import inputs
from glm_jax.engine.assets import Companions
from glm_jax.engine.request import Row
from glm_jax.errors import SamplingError
from glm_jax.sampling import SamplingParams, completion_seeds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What a model expects of a request, and what it fills in where the request says nothing.

    Attributes:
        companions: tokenizer, sampling defaults and end-of-sequence ids.
        vocab: ids that the model has.
        max_len: longest prompt and completion together.
        seeds: draws a seed for each prompt without one.
    """

    companions: Companions
    vocab: int
    max_len: int
    seeds: random.Random

    def ids(self, given: Any, room: int = 1) -> tuple[bool, list[tuple[int, ...]]]:
        """Whether several prompts were given, and the token ids of each.

        Args:
            given: as :func:`glm_jax.engine.inputs.encode` takes it.
            room: tokens of the context that must stay free.
        """
        return inputs.encode(given, self.companions.tokenizer, self.vocab, self.max_len - room)

    def sampling(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        """The options of a call: single ones over ``params`` over the checkpoint's defaults.

        Raises:
            SamplingError: if an option is impossible or unknown.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling options must be SamplingParams or keywords, not {type(params).__name__}")
        base = params or self.companions.defaults
        return base.replace(**options) if options else base

    def rows(self, prompt: tuple[int, ...], params: SamplingParams, order: int = 0) -> list[Row]:
        """The ``n`` rows of one prompt, the ``order``-th of its call."""
        if params.seed is None:
            params = params.replace(seed=self.seeds.randrange(2**53))
        eos_ids = () if params.ignore_eos else self.companions.eos_ids
        stop_ids = frozenset((*params.stop_token_ids, *eos_ids))
        budget = min(params.max_tokens, self.max_len - len(prompt))
        return [
            Row(
                tokenizer=self.companions.tokenizer,
                prompt_ids=prompt,
                params=params,
                seed=seed,
                budget=budget,
                stop_ids=stop_ids,
                index=index,
                order=order,
            )
            for index, seed in enumerate(completion_seeds(params))
        ]
