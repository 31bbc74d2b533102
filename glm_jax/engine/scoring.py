"""Teacher-forced logits: of every token of a prompt, of the prediction layer, and with traced activations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.cache.latent import LatentCache
from glm_jax.engine.runner import MIN_CHUNK_SIZE, ModelRunner, PromptTokenIds, iter_prompt_chunks
from glm_jax.engine.steps import Params, apply_model, bucket_size
from glm_jax.errors import PromptError
from glm_jax.memory import PREFILL_CHUNK_SIZE
from glm_jax.model.glm import GLM

MAX_BATCHED_LOGITS_TOKENS = 1024  # with the logits of each: 600 MB of GLM-4.7-Flash's


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill_chunk_logits(
    model: GLM, params: Params, cache: LatentCache, tokens: jax.Array, start: jax.Array
) -> tuple[LatentCache, jax.Array]:
    """One chunk like :func:`prefill_chunk`, with the logits of every token, float32 ``[B, C, V]``."""
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    logits, cache = apply_model(model, params, tokens, positions, cache)
    return cache, logits


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "draft_cache"))
def mtp_chunk_logits(
    model: GLM,
    params: Params,
    cache: LatentCache,
    draft_cache: LatentCache,
    tokens: jax.Array,
    next_tokens: jax.Array,
    start: jax.Array,
    last_position: jax.Array,
) -> tuple[LatentCache, LatentCache, jax.Array]:
    """The prediction layer's logits over one chunk of a row, float32 ``[1, C, V]``.

    Entry ``p`` joins the state of position ``p`` with token ``p + 1``, and the last one with the model's own argmax.

    Args:
        cache: the model's, donated.
        draft_cache: the prediction layer's own, donated.
        tokens: int32 ``[1, C]``, padded on the right.
        next_tokens: int32 ``[1, C]``, the token after each.
        start: int32, position of the chunk's first token.
        last_position: int32, position of the row's last token; the entries after it mean nothing.

    Returns:
        Both caches and the logits.
    """
    positions = (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]
    hidden, cache = apply_model(model, params, tokens, positions, cache, method="hidden")
    end = jax.lax.dynamic_slice_in_dim(hidden, jnp.clip(last_position - start, 0, tokens.shape[1] - 1), 1, axis=1)
    guess = jnp.argmax(apply_model(model, params, end, method="head")[:, 0], axis=-1).astype(jnp.int32)
    next_tokens = jnp.where(positions == last_position, guess[:, None], next_tokens)
    logits, _, draft_cache = apply_model(model, params, hidden, next_tokens, positions, draft_cache, method="draft")
    return cache, draft_cache, logits


@functools.partial(jax.jit, static_argnames=("model", "trace", "edit", "attention"))
def traced_logits(
    model: GLM,
    params: Params,
    tokens: jax.Array,
    trace: tuple[str, ...],
    edit: tuple[Any, ...],
    attention: Any = "auto",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits of whole rows and the activations of ``trace``; ``edit`` is a tuple of (name, function)."""
    logits, _, recorded = apply_model(model, params, tokens, trace=trace, edit=dict(edit), attention=attention)
    return logits, recorded


def stack_token_ids(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of equal length as int32 ``[B, T]``.

    Raises:
        PromptError: if the lengths differ.
    """
    if len({len(row) for row in token_ids}) != 1:
        raise PromptError("traced or edited rows must have the same length; give them one by one")
    return np.asarray(token_ids, np.int32)


def prompt_logits(runner: ModelRunner, prompts: PromptTokenIds, start_position: int = 0) -> list[np.ndarray]:
    """Logits of every token of every row, float32 ``[T, V]`` each, on the host; some rows at a time.

    Those before position ``start_position`` are left out.
    """
    width = min(PREFILL_CHUNK_SIZE, bucket_size(max(map(len, prompts)), MIN_CHUNK_SIZE))
    together = min(max(1, MAX_BATCHED_LOGITS_TOKENS // width), bucket_size(len(prompts)))
    groups = [prompts[i : i + together] for i in range(0, len(prompts), together)]
    with runner.mesh_context():
        return [row for group in groups for row in _batch_logits(runner, group, together, start_position)]


def mtp_logits(runner: ModelRunner, prompt: Sequence[int]) -> np.ndarray:
    """The prediction layer's logits of one row, float32 ``[T, V]``, on the host."""
    last, parts = np.int32(len(prompt) - 1), []
    with runner.mesh_context():
        cache, drafts = runner.allocate_cache(1, len(prompt)), runner.allocate_cache(1, len(prompt), num_layers=1)
        following = [tokens for _, tokens in iter_prompt_chunks([[*prompt[1:], 0]], 1, PREFILL_CHUNK_SIZE)]
        for (start, tokens), after in zip(iter_prompt_chunks([prompt], 1, PREFILL_CHUNK_SIZE), following, strict=True):
            with runner.announce_compile(f"prediction layer of {tokens.shape[1]} tokens", None, cache.capacity):
                cache, drafts, logits = mtp_chunk_logits(
                    runner.model, runner.params, cache, drafts, tokens, after, np.int32(start), last
                )
            parts.append(np.asarray(logits)[0, : len(prompt) - start])
    return np.concatenate(parts)


def _batch_logits(
    runner: ModelRunner, prompts: PromptTokenIds, batch_size: int, start_position: int
) -> list[np.ndarray]:
    out: list[list[np.ndarray]] = [[] for _ in prompts]
    cache = runner.allocate_cache(batch_size, max(map(len, prompts)))
    for start, tokens in iter_prompt_chunks(prompts, batch_size, PREFILL_CHUNK_SIZE):
        with runner.announce_compile(f"logits of {batch_size} x {tokens.shape[1]} tokens", None, cache.capacity):
            cache, logits = prefill_chunk_logits(runner.model, runner.params, cache, tokens, np.int32(start))
        if start + tokens.shape[1] <= start_position:
            continue
        host = np.asarray(logits)
        for row, prompt in enumerate(prompts):
            if len(prompt) > start:
                out[row].append(host[row, max(0, start_position - start) : len(prompt) - start])
    return [np.concatenate(parts) for parts in out]
