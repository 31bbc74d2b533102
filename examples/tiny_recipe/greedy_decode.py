"""Greedy decoding of many prompts at once, small enough to read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.model import GLM

BATCH_SIZE = 32
# Prompts are padded to one of these, so that little is compiled.
PADDED_LENGTHS = (128, 512, 1024)


def generate_greedy(
    cfg: Config, params: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Continues each prompt (token ids) until a token of ``stop_ids``, which is kept, or for ``new_tokens``."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH_SIZE):
        part = order[start : start + BATCH_SIZE]
        for i, written in zip(part, _batch(cfg, params, [prompts[i] for i in part], new_tokens), strict=True):
            results[i] = _truncate_at_stop(stop_ids, written)
    return results


def _batch(cfg: Config, params: Any, prompts: list[Sequence[int]], new_tokens: int) -> list[list[int]]:
    width = next(width for width in PADDED_LENGTHS if width >= max(map(len, prompts)))
    tokens = np.zeros((BATCH_SIZE, width), np.int32)
    lengths = np.ones(BATCH_SIZE, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    written = _decode(cfg, params, jnp.asarray(tokens), jnp.asarray(lengths), new_tokens)
    return np.asarray(written)[: len(prompts)].tolist()


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(cfg: Config, params: Any, tokens: jax.Array, lengths: jax.Array, new_tokens: int) -> jax.Array:
    model = GLM(cfg)
    rows, width = tokens.shape
    cache = LatentCache.create(cfg, rows, width + new_tokens, params["embed"].dtype)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], tokens.shape)
    logits, cache = model.apply({"params": params}, tokens, positions, cache, logits_at=lengths - 1)  # pyright: ignore[reportAssignmentType]
    first = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    def step(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        token, cache = carry
        logits, cache = model.apply({"params": params}, token[:, None], (lengths + i)[:, None], cache)  # pyright: ignore[reportAssignmentType]
        return (jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache), token

    _, written = jax.lax.scan(step, (first, cache), jnp.arange(new_tokens, dtype=jnp.int32))
    return written.T


def _truncate_at_stop(ends: Collection[int], tokens: list[int]) -> list[int]:
    found = [i for i, token in enumerate(tokens) if token in ends]
    return tokens[: found[0] + 1] if found else tokens
