"""From what a caller gives, prompts and options, to rows that can be run. Imports no JAX."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from glm_jax.engine import inputs
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.request import Request
from glm_jax.errors import SamplingError
from glm_jax.sampling import SamplingParams, completion_seeds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputProcessor:
    """What a model expects of a request, and what it fills in where the request says nothing.

    Attributes:
        assets: tokenizer, sampling defaults and end-of-sequence ids.
        vocab_size: ids that the model has.
        max_model_len: longest prompt and completion together.
        seed_rng: draws a seed for each prompt without one.
    """

    assets: ModelAssets
    vocab_size: int
    max_model_len: int
    seed_rng: random.Random

    def tokenize(self, raw_prompts: Any, reserved_tokens: int = 1) -> tuple[bool, list[tuple[int, ...]]]:
        """Whether several prompts were given, and the token ids of each.

        Args:
            raw_prompts: as :func:`glm_jax.engine.inputs.tokenize_prompts` takes it.
            reserved_tokens: tokens of the context that must stay free.
        """
        return inputs.tokenize_prompts(
            raw_prompts, self.assets.tokenizer, self.vocab_size, self.max_model_len - reserved_tokens
        )

    def resolve_sampling_params(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        """The options of a call: single ones over ``params`` over the checkpoint's defaults.

        Raises:
            SamplingError: if an option is impossible or unknown.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling options must be SamplingParams or keywords, not {type(params).__name__}")
        base = params or self.assets.default_sampling_params
        return base.replace(**options) if options else base

    def make_requests(self, prompt: tuple[int, ...], params: SamplingParams, prompt_index: int = 0) -> list[Request]:
        """The ``n`` rows of one prompt, the ``prompt_index``-th of its call."""
        if params.seed is None:
            params = params.replace(seed=self.seed_rng.randrange(2**53))
        eos_ids = () if params.ignore_eos else self.assets.eos_ids
        stop_ids = frozenset((*params.stop_token_ids, *eos_ids))
        budget = min(params.max_tokens, self.max_model_len - len(prompt))
        return [
            Request(
                tokenizer=self.assets.tokenizer,
                prompt_ids=prompt,
                params=params,
                seed=seed,
                max_new_tokens=budget,
                stop_ids=stop_ids,
                index=index,
                prompt_index=prompt_index,
            )
            for index, seed in enumerate(completion_seeds(params))
        ]
