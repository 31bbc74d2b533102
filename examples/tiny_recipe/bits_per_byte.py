"""Compression rate of the model on text, in bits per byte."""

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
    """Mean number of bits per UTF-8 byte over all texts; every byte counts once.

    Each text follows ``<|endoftext|>`` and is read in overlapping windows. All but the last ``stride`` tokens of a
    window only serve as context.

    Args:
        cfg: Architecture of the model.
        params: Parameters of the model.
        tokenizer: The miniature's tokenizer.
        texts: Texts to measure.
        window: Length of a window in tokens.
        stride: Distance between windows in tokens.
        rows: Windows per forward pass.
    """
    tokens, is_counted = _windows(tokenizer, texts, window, stride)
    nats = 0.0
    for start in range(0, len(tokens), rows):
        batch = [_pad(array[start : start + rows], rows) for array in (tokens, is_counted)]
        nats += float(_sum_nats(cfg, params, *batch))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def _windows(tokenizer: Tokenizer, texts: Sequence[str], window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Token windows ``int32 [W, window + 1]`` and the tokens to count in each, ``float32 [W, window + 1]``."""
    tokens, is_counted = [], []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = np.asarray([SPECIAL_IDS["<|endoftext|>"], *encoding.ids], np.int32)
        done = 1
        while done < len(ids):
            start = max(0, done - (window - stride)) if done > 1 else 0
            chunk = ids[start : start + window + 1]
            mask = np.arange(start, start + len(chunk)) >= done
            tokens.append(np.pad(chunk, (0, window + 1 - len(chunk))))
            is_counted.append(np.pad(mask, (0, window + 1 - len(chunk))).astype(np.float32))
            done = start + len(chunk)
    return np.stack(tokens), np.stack(is_counted)


def _pad(array: np.ndarray, rows: int) -> jax.Array:
    return jnp.asarray(np.pad(array, ((0, rows - len(array)), (0, 0))))


@functools.partial(jax.jit, static_argnums=0)
def _sum_nats(cfg: Config, params: Any, tokens: jax.Array, is_counted: jax.Array) -> jax.Array:
    logits, _ = GLM(cfg).apply({"params": params}, tokens[:, :-1], attention="expanded")  # pyright: ignore[reportAssignmentType]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(nats * is_counted[:, 1:])
