"""Greedy decoding of a batch of prompts, short enough to read in one go."""

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
# Prompts are padded to one of these lengths, so that few programs are compiled.
PADDED_LENGTHS = (128, 512, 1024)


def generate_greedy(
    cfg: Config, params: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Continues each prompt (token ids) by up to ``new_tokens`` tokens; a token of ``stop_ids`` ends it and is kept."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(by_length), BATCH_SIZE):
        indices = by_length[start : start + BATCH_SIZE]
        outputs = _decode_batch(cfg, params, [prompts[i] for i in indices], new_tokens)
        for i, output in zip(indices, outputs, strict=True):
            results[i] = _truncate_at_stop(output, stop_ids)
    return results


def _decode_batch(cfg: Config, params: Any, prompts: list[Sequence[int]], new_tokens: int) -> list[list[int]]:
    width = next(width for width in PADDED_LENGTHS if width >= max(map(len, prompts)))
    tokens = np.zeros((BATCH_SIZE, width), np.int32)
    lengths = np.ones(BATCH_SIZE, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    output = _decode(cfg, params, jnp.asarray(tokens), jnp.asarray(lengths), new_tokens)
    return np.asarray(output)[: len(prompts)].tolist()


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(cfg: Config, params: Any, tokens: jax.Array, lengths: jax.Array, new_tokens: int) -> jax.Array:
    model = GLM(cfg)
    batch, width = tokens.shape
    cache = LatentCache.create(cfg, batch, width + new_tokens, params["embed"].dtype)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], tokens.shape)
    logits, cache = model.apply({"params": params}, tokens, positions, cache, logits_at=lengths - 1)  # pyright: ignore[reportAssignmentType]
    first = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    def step(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        token, cache = carry
        logits, cache = model.apply({"params": params}, token[:, None], (lengths + i)[:, None], cache)  # pyright: ignore[reportAssignmentType]
        return (jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache), token

    _, output = jax.lax.scan(step, (first, cache), jnp.arange(new_tokens, dtype=jnp.int32))
    return output.T


def _truncate_at_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    length = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:length]
