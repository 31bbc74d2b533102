"""Bits per byte of a text under the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from examples.tiny_recipe.tokenizer import SPECIAL_IDS
from glm_jax.config import Config
from glm_jax.model import GLM


def bits_per_byte(
    cfg: Config,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int = 1024,
    stride: int = 512,
    rows: int = 4,
) -> float:
    """Bits per UTF-8 byte over all texts, every byte counted once.

    Each text follows ``<|endoftext|>`` and is read in windows; a window's first part only gives context to the rest.
    """
    tokens, counted = _windows(tokenizer, texts, window, stride)
    nats = 0.0
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        padded = [_pad(a[part], rows) for a in (tokens, counted)]
        nats += float(_nats(cfg, params, *padded))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def _windows(tokenizer: Tokenizer, texts: Sequence[str], window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, counted = [], []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = np.asarray([SPECIAL_IDS["<|endoftext|>"], *encoding.ids], np.int32)
        done = 1
        while done < len(ids):
            start = max(0, done - (window - stride)) if done > 1 else 0
            part = ids[start : start + window + 1]
            mask = np.arange(start, start + len(part)) >= done
            tokens.append(np.pad(part, (0, window + 1 - len(part))))
            counted.append(np.pad(mask, (0, window + 1 - len(part))).astype(np.float32))
            done = start + len(part)
    return np.stack(tokens), np.stack(counted)


def _pad(a: np.ndarray, rows: int) -> jax.Array:
    return jnp.asarray(np.pad(a, ((0, rows - len(a)), (0, 0))))


@functools.partial(jax.jit, static_argnums=0)
def _nats(cfg: Config, params: Any, tokens: jax.Array, counted: jax.Array) -> jax.Array:
    logits, _ = GLM(cfg).apply({"params": params}, tokens[:, :-1], attention="expanded")  # pyright: ignore[reportAssignmentType]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(each * counted[:, 1:])
