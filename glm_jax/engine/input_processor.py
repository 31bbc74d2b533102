"""Checks and tokenizes prompts, resolves sampling options, and makes requests from both. Imports no JAX."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.request import Request
from glm_jax.errors import PromptError, SamplingError
from glm_jax.sampling import SamplingParams, completion_seeds
from glm_jax.text import Tokenizer


@runtime_checkable
class TokenArray(Protocol):
    """An array of token ids, of NumPy or JAX."""

    def __array__(self) -> np.ndarray:
        """The same values as a NumPy array."""
        ...


SinglePrompt: TypeAlias = str | Sequence[int]
Prompt: TypeAlias = SinglePrompt | TokenArray
TokenIds: TypeAlias = tuple[int, ...]
SAMPLING_PARAM_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputProcessor:
    """Turns the arguments of a call into requests.

    Attributes:
        assets: Tokenizer, default sampling options and end-of-sequence ids.
        vocab_size: Number of token ids of the model.
        max_model_len: Longest prompt and completion together, in tokens.
        seed_rng: Source of a seed for each prompt whose options have none.
    """

    assets: ModelAssets
    vocab_size: int
    max_model_len: int
    seed_rng: random.Random

    def tokenize(self, prompts: Prompt | Sequence[Prompt], reserved_tokens: int = 1) -> tuple[bool, list[TokenIds]]:
        """Token ids of one prompt or several; see :func:`tokenize_prompts`.

        Args:
            prompts: One prompt, or a sequence of prompts.
            reserved_tokens: Tokens of the context that the prompt must leave free.
        """
        return tokenize_prompts(prompts, self.assets.tokenizer, self.vocab_size, self.max_model_len - reserved_tokens)

    def tokenize_pair(self, prompt: Prompt, continuation: Prompt) -> tuple[TokenIds, TokenIds]:
        """Token ids of a prompt and of a continuation, which together must fit into the context.

        Raises:
            PromptError: if either is empty, or both together are too long.
        """
        _, (prompt_ids,) = self.tokenize(prompt)
        _, (continuation_ids,) = self.tokenize(continuation)
        self.tokenize([*prompt_ids, *continuation_ids], reserved_tokens=0)
        return prompt_ids, continuation_ids

    def resolve_sampling_params(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        """The options of a call: ``options`` override ``params``, which default to the checkpoint's options.

        Raises:
            SamplingError: if an option is unknown or has an impossible value.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling options must be SamplingParams or keywords, not {type(params).__name__}")
        base = params or self.assets.default_sampling_params
        return base.replace(**options) if options else base

    def make_requests(self, prompt_ids: TokenIds, params: SamplingParams, prompt_index: int = 0) -> list[Request]:
        """The ``n`` requests of one prompt.

        Args:
            prompt_ids: Token ids of the prompt.
            params: Sampling options; without a seed the prompt gets a random one.
            prompt_index: Index of the prompt in its call.
        """
        if params.seed is None:
            params = params.replace(seed=self.seed_rng.randrange(2**53))
        eos_ids = () if params.ignore_eos else self.assets.eos_ids
        stop_ids = frozenset((*params.stop_token_ids, *eos_ids))
        max_new_tokens = min(params.max_tokens, self.max_model_len - len(prompt_ids))
        return [
            Request(
                tokenizer=self.assets.tokenizer,
                prompt_ids=prompt_ids,
                params=params,
                seed=seed,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                index=index,
                prompt_index=prompt_index,
            )
            for index, seed in enumerate(completion_seeds(params))
        ]


def tokenize_prompts(
    prompts: Prompt | Sequence[Prompt], tokenizer: Tokenizer, vocab_size: int, max_prompt_tokens: int
) -> tuple[bool, list[TokenIds]]:
    """Token ids of one prompt or several.

    Args:
        prompts: Text, token ids ``[T]``, or a sequence of these; an array has ids ``[T]`` or ``[B, T]``.
        tokenizer: Tokenizer for prompts that are text.
        vocab_size: Number of token ids of the model.
        max_prompt_tokens: Longest prompt that is accepted, in tokens.

    Returns:
        Whether ``prompts`` is a sequence of prompts, and the ids of each prompt.

    Raises:
        PromptError: if a prompt is empty, too long, has an id outside the vocabulary, or is of another type.
    """
    values = _to_python_values(prompts)
    if isinstance(values, str) or _is_token_ids(values):
        return False, [_tokenize_prompt(values, tokenizer, vocab_size, max_prompt_tokens, "the prompt")]
    if not isinstance(values, Sequence) or isinstance(values, bytes | bytearray):
        raise PromptError(f"a prompt is text, token ids, or a list of these, not {_describe_value(values)}")
    if not values:
        raise PromptError("the prompt is empty: give at least one token, or a list with at least one prompt")
    return True, [
        _tokenize_prompt(
            _to_python_values(prompt), tokenizer, vocab_size, max_prompt_tokens, f"prompt {i} of {len(values)}"
        )
        for i, prompt in enumerate(values, 1)
    ]


def _to_python_values(value: object) -> object:
    """An array as a list of Python numbers; anything else unchanged."""
    return np.asarray(value).tolist() if isinstance(value, TokenArray) else value


def _describe_value(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _is_token_ids(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray) or len(value) == 0:
        return False
    return all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in value)


def _tokenize_prompt(prompt: Any, tokenizer: Tokenizer, vocab_size: int, max_prompt_tokens: int, name: str) -> TokenIds:
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
    if len(ids) > max_prompt_tokens:
        raise PromptError(
            f"{name} has {len(ids):,} tokens; "
            f"at most {max_prompt_tokens:,} fit into the context of this model as loaded"
        )
    if unknown := [i for i in ids if not 0 <= i < vocab_size]:
        raise PromptError(f"{name} has token id {unknown[0]}, which is outside the vocabulary of {vocab_size:,}")
    return ids
