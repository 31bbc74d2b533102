"""A quick look at answers: one forward pass over question and right answer, instead of writing the answer."""

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

BATCH, MULTIPLE = 32, 128


def teacher_forced_correct(
    cfg: Config, params: Any, tokenizer: Tokenizer, items: Sequence[Conversation], render: Render
) -> list[bool]:
    """Whether each token of the right last turn is the greedy choice after those before it, by conversation.

    That is whether greedy decoding would give exactly this turn, think block included.
    """
    prompts = [len(tokenizer.encode(item.prompt(render)).ids) for item in items]
    whole = [tokenizer.encode(item.text(render)).ids for item in items]
    order = sorted(range(len(items)), key=lambda i: len(whole[i]))
    right = [False] * len(items)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        length = -(-max(len(whole[i]) for i in chosen) // MULTIPLE) * MULTIPLE
        rows = np.zeros((BATCH, length), np.int32)
        for row, i in zip(rows, chosen, strict=False):
            row[: len(whole[i])] = whole[i]
        best = np.asarray(_greedy(cfg, params, jnp.asarray(rows)))
        for row, said, i in zip(rows, best, chosen, strict=False):
            answer = slice(prompts[i], len(whole[i]))
            right[i] = bool((said[answer.start - 1 : answer.stop - 1] == row[answer]).all())
    return right


@functools.partial(jax.jit, static_argnums=0)
def _greedy(cfg: Config, params: Any, tokens: jax.Array) -> jax.Array:
    logits, _ = GLM(cfg).apply({"params": params}, tokens, attention="expanded")  # pyright: ignore[reportAssignmentType]
    return jnp.argmax(logits, -1)
