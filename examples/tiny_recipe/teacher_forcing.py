"""Exact-match accuracy from one forward pass over question and correct answer, without generating."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.tiny_recipe.conversations import Conversation, Render
from glm_jax.config import Config
from glm_jax.model import GLM

BATCH_SIZE, LENGTH_MULTIPLE = 32, 128


def teacher_forced_correct(
    cfg: Config, params: Any, tokenizer: Tokenizer, items: Sequence[Conversation], render: Render
) -> list[bool]:
    """Whether greedy decoding would give exactly the last message of each conversation, think block included.

    This is the case if each of its tokens is the greedy choice after all tokens before it.
    """
    prompts = [len(tokenizer.encode(item.prompt(render)).ids) for item in items]
    whole = [tokenizer.encode(item.text(render)).ids for item in items]
    by_length = sorted(range(len(items)), key=lambda i: len(whole[i]))
    is_correct = [False] * len(items)
    for start in range(0, len(by_length), BATCH_SIZE):
        indices = by_length[start : start + BATCH_SIZE]
        length = -(-max(len(whole[i]) for i in indices) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        rows = np.zeros((BATCH_SIZE, length), np.int32)
        for row, i in zip(rows, indices, strict=False):
            row[: len(whole[i])] = whole[i]
        greedy = np.asarray(_greedy_tokens(cfg, params, jnp.asarray(rows)))
        for row, predicted, i in zip(rows, greedy, indices, strict=False):
            answer = slice(prompts[i], len(whole[i]))
            is_correct[i] = bool((predicted[answer.start - 1 : answer.stop - 1] == row[answer]).all())
    return is_correct


@functools.partial(jax.jit, static_argnums=0)
def _greedy_tokens(cfg: Config, params: Any, tokens: jax.Array) -> jax.Array:
    logits, _ = GLM(cfg).apply({"params": params}, tokens, attention="expanded")  # pyright: ignore[reportAssignmentType]
    return jnp.argmax(logits, -1)
