"""Prompts to token ids, and rows to batches. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from glm_jax.engine.request import Row
from glm_jax.errors import PromptError
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer

Prompt = str | Sequence[int] | np.ndarray
SAMPLING_OPTIONS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def encode(given: Any, tokenizer: Tokenizer, vocab: int, longest: int) -> tuple[bool, list[tuple[int, ...]]]:
    """Token ids of one prompt or many.

    Args:
        given: text, ids ``[T]``, or a sequence of these; ids may be an array, ``[T]`` or ``[B, T]``.
        tokenizer: for text.
        vocab: number of ids the model has.
        longest: most tokens a prompt may have.

    Returns:
        Whether a sequence of prompts was given, and the ids of each.

    Raises:
        PromptError: if a prompt is empty, too long, or no prompt at all.
    """
    given = _plain(given)
    if isinstance(given, str) or _is_ids(given):
        return False, [_encode_one(given, tokenizer, vocab, longest, "the prompt")]
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise PromptError(f"a prompt is text, token ids, or a list of these, not {_shown(given)}")
    if not given:
        raise PromptError("the prompt is empty: give at least one token, or a list with at least one prompt")
    names = [f"prompt {i + 1} of {len(given)}" for i in range(len(given))]
    return True, [
        _encode_one(_plain(prompt), tokenizer, vocab, longest, name) for prompt, name in zip(given, names, strict=True)
    ]


def _plain(given: Any) -> Any:
    """Lists of Python numbers for arrays, NumPy's and JAX's alike; anything else as it is."""
    return np.asarray(given).tolist() if hasattr(given, "__array__") else given


def _shown(given: Any) -> str:
    return f"{type(given).__name__} {given!r:.60}"


def _is_ids(given: Any) -> bool:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray) or len(given) == 0:
        return False
    return all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in given)


def _encode_one(prompt: Any, tokenizer: Tokenizer, vocab: int, longest: int, name: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = tuple(tokenizer.encode(prompt))
    elif _is_ids(prompt):
        ids = tuple(int(i) for i in prompt)
    elif isinstance(prompt, Sequence) and len(prompt) == 0:
        ids = ()
    else:
        raise PromptError(f"{name} is neither text nor a list of token ids: {_shown(prompt)}")
    if not ids:
        raise PromptError(f"{name} is empty: give at least one token")
    if len(ids) > longest:
        raise PromptError(
            f"{name} has {len(ids):,} tokens; at most {longest:,} fit into the context of this model as loaded"
        )
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise PromptError(f"{name} has token id {wrong[0]}, which is outside the vocabulary of {vocab:,}")
    return ids


def rectangle(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of equal length as int32 ``[B, T]``.

    Raises:
        PromptError: if the lengths differ.
    """
    if len({len(row) for row in rows}) != 1:
        raise PromptError("traced or edited rows must have the same length; give them one by one")
    return np.asarray(rows, np.int32)


def batches(rows: Sequence[Row], most: int, fits: Callable[[Sequence[Row]], bool]) -> Iterator[list[Row]]:
    """Rows in batches of similar length; completions of one prompt stay together where they fit.

    Args:
        rows: of a call.
        most: rows of a batch.
        fits: whether a batch does; a single row must.
    """
    left = sorted(rows, key=lambda row: (len(row.prompt_ids), row.order, row.index))
    while left:
        count = min(most, len(left))
        while count > 1 and not fits(left[:count]):
            count = 1 << (count - 1).bit_length() - 1  # batches are padded to powers of two: anything between is waste
        yield left[:count]
        left = left[count:]


def valid_vocab(tokenizer: Tokenizer) -> int:
    """Ids from here on stand for no token; they end the vocabulary."""
    unused = set(tokenizer.unused_ids)
    last = tokenizer.model_vocab
    while last - 1 in unused:
        last -= 1
    return last
