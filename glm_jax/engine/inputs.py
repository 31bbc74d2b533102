"""Prompts to token ids, and rows to batches. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from glm_jax.engine.request import Request
from glm_jax.errors import PromptError
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer

Prompt = str | Sequence[int] | np.ndarray
SAMPLING_PARAM_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


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


def stack_token_ids(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of equal length as int32 ``[B, T]``.

    Raises:
        PromptError: if the lengths differ.
    """
    if len({len(row) for row in token_ids}) != 1:
        raise PromptError("traced or edited rows must have the same length; give them one by one")
    return np.asarray(token_ids, np.int32)


def make_batches(
    requests: Sequence[Request], max_batch_size: int, fits: Callable[[Sequence[Request]], bool]
) -> Iterator[list[Request]]:
    """Rows in batches of similar length; completions of one prompt stay together where they fit.

    Args:
        requests: of a call.
        max_batch_size: rows of a batch.
        fits: whether a batch does; a single row must.
    """
    left = sorted(requests, key=lambda row: (len(row.prompt_ids), row.prompt_index, row.index))
    while left:
        count = min(max_batch_size, len(left))
        while count > 1 and not fits(left[:count]):
            count = 1 << (count - 1).bit_length() - 1  # batches are padded to powers of two: anything between is waste
        yield left[:count]
        left = left[count:]


def valid_vocab_size(tokenizer: Tokenizer) -> int:
    """Ids from here on stand for no token; they end the vocabulary."""
    unused = set(tokenizer.unused_ids)
    last = tokenizer.model_vocab
    while last - 1 in unused:
        last -= 1
    return last
