"""From what a caller gives, prompts and options, to rows that can be run. Imports no JAX."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.request import Request
from glm_jax.errors import PromptError, SamplingError
from glm_jax.sampling import SamplingParams, completion_seeds
from glm_jax.text import Tokenizer

Prompt = str | Sequence[int] | np.ndarray
SAMPLING_PARAM_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


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
            raw_prompts: as :func:`glm_jax.engine.input_processor.tokenize_prompts` takes it.
            reserved_tokens: tokens of the context that must stay free.
        """
        return tokenize_prompts(
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


def tokenize_prompts(
    raw_prompts: Any, tokenizer: Tokenizer, vocab_size: int, max_prompt_tokens: int
) -> tuple[bool, list[tuple[int, ...]]]:
    """Token ids of one prompt or many.

    Args:
        raw_prompts: text, ids ``[T]``, or a sequence of these; ids may be an array, ``[T]`` or ``[B, T]``.
        tokenizer: for text.
        vocab_size: number of ids the model has.
        max_prompt_tokens: most tokens a prompt may have.

    Returns:
        Whether a sequence of prompts was given, and the ids of each.

    Raises:
        PromptError: if a prompt is empty, too long, or no prompt at all.
    """
    raw_prompts = _to_python_lists(raw_prompts)
    if isinstance(raw_prompts, str) or _is_token_ids(raw_prompts):
        return False, [_tokenize_prompt(raw_prompts, tokenizer, vocab_size, max_prompt_tokens, "the prompt")]
    if not isinstance(raw_prompts, Sequence) or isinstance(raw_prompts, bytes | bytearray):
        raise PromptError(f"a prompt is text, token ids, or a list of these, not {_describe_value(raw_prompts)}")
    if not raw_prompts:
        raise PromptError("the prompt is empty: give at least one token, or a list with at least one prompt")
    names = [f"prompt {i + 1} of {len(raw_prompts)}" for i in range(len(raw_prompts))]
    return True, [
        _tokenize_prompt(_to_python_lists(prompt), tokenizer, vocab_size, max_prompt_tokens, name)
        for prompt, name in zip(raw_prompts, names, strict=True)
    ]


def _to_python_lists(given: Any) -> Any:
    """Lists of Python numbers for arrays, NumPy's and JAX's alike; anything else as it is."""
    return np.asarray(given).tolist() if hasattr(given, "__array__") else given


def _describe_value(given: Any) -> str:
    return f"{type(given).__name__} {given!r:.60}"


def _is_token_ids(given: Any) -> bool:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray) or len(given) == 0:
        return False
    return all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in given)


def _tokenize_prompt(prompt: Any, tokenizer: Tokenizer, vocab: int, longest: int, name: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = tuple(tokenizer.encode(prompt))
    elif _is_token_ids(prompt):
        ids = tuple(int(i) for i in prompt)
    elif isinstance(prompt, Sequence) and len(prompt) == 0:
        ids = ()
    else:
        raise PromptError(f"{name} is neither text nor a list of token ids: {_describe_value(prompt)}")
    if not ids:
        raise PromptError(f"{name} is empty: give at least one token")
    if len(ids) > longest:
        raise PromptError(
            f"{name} has {len(ids):,} tokens; at most {longest:,} fit into the context of this model as loaded"
        )
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise PromptError(f"{name} has token id {wrong[0]}, which is outside the vocabulary of {vocab:,}")
    return ids
