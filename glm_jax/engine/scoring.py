"""Teacher-forced logits: of every token, of the prediction layer, with traced activations; scores of continuations."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.cache.latent import LatentCache
from glm_jax.engine.outputs import Score
from glm_jax.engine.runner import MIN_CHUNK_SIZE, ModelRunner, PromptTokenIds, iter_prompt_chunks
from glm_jax.engine.steps import apply_model, bucket_size
from glm_jax.errors import PromptError
from glm_jax.memory import PREFILL_CHUNK_SIZE
from glm_jax.model.glm import GLM
from glm_jax.model.hooks import EditFn
from glm_jax.ops.mla import AttentionForm
from glm_jax.weights.params import ParamTree

MAX_BATCHED_LOGITS_TOKENS = 1024  # their logits take 600 MB for GLM-4.7-Flash


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill_chunk_logits(
    model: GLM, params: ParamTree, cache: LatentCache, tokens: jax.Array, start: jax.Array
) -> tuple[LatentCache, jax.Array]:
    """Prefills one chunk like :func:`~glm_jax.engine.steps.prefill_chunk`, but with the logits of every token.

    Args:
        model: Module.
        params: Parameters of the module.
        cache: Latents of the earlier chunks; donated.
        tokens: ``int32 [B, C]``, padded on the right.
        start: ``int32 []``, position of the first token of the chunk.

    Returns:
        The cache and the logits ``float32 [B, C, V]``.
    """
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    logits, cache = apply_model(model, params, tokens, positions, cache)
    return cache, logits


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "draft_cache"))
def mtp_chunk_logits(
    model: GLM,
    params: ParamTree,
    cache: LatentCache,
    draft_cache: LatentCache,
    tokens: jax.Array,
    next_tokens: jax.Array,
    start: jax.Array,
    last_position: jax.Array,
) -> tuple[LatentCache, LatentCache, jax.Array]:
    """Logits of the prediction layer for one chunk of a sequence.

    Entry ``p`` combines the hidden state at position ``p`` with token ``p + 1``; at the last position, which has no
    next token, with the argmax of the model's own logits.

    Args:
        model: Module.
        params: Parameters of the module.
        cache: Cache of the model; donated.
        draft_cache: Cache of the prediction layer; donated.
        tokens: ``int32 [1, C]``, padded on the right.
        next_tokens: ``int32 [1, C]``, the token after each of ``tokens``.
        start: ``int32 []``, position of the first token of the chunk.
        last_position: ``int32 []``, position of the last token of the sequence; entries after it are meaningless.

    Returns:
        Both caches and the logits ``float32 [1, C, V]``.
    """
    positions = (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]
    hidden, cache = apply_model(model, params, tokens, positions, cache, method="hidden")
    last_index = jnp.clip(last_position - start, 0, tokens.shape[1] - 1)
    last_hidden = jax.lax.dynamic_slice_in_dim(hidden, last_index, 1, axis=1)
    guess = jnp.argmax(apply_model(model, params, last_hidden, method="head")[:, 0], axis=-1).astype(jnp.int32)
    next_tokens = jnp.where(positions == last_position, guess[:, None], next_tokens)
    logits, _, draft_cache = apply_model(model, params, hidden, next_tokens, positions, draft_cache, method="draft")
    return cache, draft_cache, logits


@functools.partial(jax.jit, static_argnames=("model", "trace", "edit", "attention"))
def traced_logits(
    model: GLM,
    params: ParamTree,
    tokens: jax.Array,
    trace: tuple[str, ...],
    edit: tuple[tuple[str, EditFn], ...],
    attention: AttentionForm = "auto",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and traced activations of whole sequences, without a cache.

    Args:
        model: Module.
        params: Parameters of the module.
        tokens: ``int32 [B, T]``.
        trace: Names of activations to return.
        edit: Pairs of an activation's name and the function that replaces it.
        attention: Form of attention; "absorbed" or "expanded" forces one.

    Returns:
        Logits ``float32 [B, T, V]``, and the activations by name.
    """
    logits, _, recorded = apply_model(model, params, tokens, trace=trace, edit=dict(edit), attention=attention)
    return logits, recorded


def trace_prompts(
    runner: ModelRunner, prompts: PromptTokenIds, trace: Sequence[str], edit: Mapping[str, EditFn]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits ``float32 [B, T, V]`` and traced activations of prompts of equal length, on the host.

    Raises:
        PromptError: if the lengths differ.
        ConfigError: if the model has no activation of a name.
    """
    if len({len(prompt) for prompt in prompts}) != 1:
        raise PromptError("traced or edited prompts must have the same length; give them one by one")
    tokens, edits = np.asarray(prompts, np.int32), tuple(sorted(edit.items()))
    with runner.mesh_context():
        logits, recorded = traced_logits(runner.model, runner.params, tokens, tuple(trace), edits)
    return np.asarray(logits), {name: np.asarray(value) for name, value in recorded.items()}


def prompt_logits(runner: ModelRunner, prompts: PromptTokenIds, start_position: int = 0) -> list[np.ndarray]:
    """Logits of every token of each prompt, ``float32 [T, V]``, on the host.

    Args:
        runner: Runner of the model.
        prompts: Token ids of each prompt; at most :data:`MAX_BATCHED_LOGITS_TOKENS` tokens run at once.
        start_position: First position whose logits are returned.
    """
    width = min(PREFILL_CHUNK_SIZE, bucket_size(max(map(len, prompts)), MIN_CHUNK_SIZE))
    batch_size = min(max(1, MAX_BATCHED_LOGITS_TOKENS // width), bucket_size(len(prompts)))
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    with runner.mesh_context():
        return [logits for batch in batches for logits in _batch_logits(runner, batch, batch_size, start_position)]


def _batch_logits(
    runner: ModelRunner, prompts: PromptTokenIds, batch_size: int, start_position: int
) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[] for _ in prompts]
    cache = runner.allocate_cache(batch_size, max(map(len, prompts)))
    for start, tokens in iter_prompt_chunks(prompts, batch_size, PREFILL_CHUNK_SIZE):
        with runner.announce_compile(f"logits of {batch_size} x {tokens.shape[1]} tokens", None, cache.capacity):
            cache, logits = prefill_chunk_logits(runner.model, runner.params, cache, tokens, np.int32(start))
        if start + tokens.shape[1] <= start_position:
            continue
        chunk_logits = np.asarray(logits)
        for row, prompt in enumerate(prompts):
            if len(prompt) > start:
                parts[row].append(chunk_logits[row, max(0, start_position - start) : len(prompt) - start])
    return [np.concatenate(chunks) for chunks in parts]


def mtp_logits(runner: ModelRunner, prompt: Sequence[int]) -> np.ndarray:
    """Logits of the prediction layer for one prompt, ``float32 [T, V]``, on the host; see :func:`mtp_chunk_logits`."""
    last_position, parts = np.int32(len(prompt) - 1), []
    with runner.mesh_context():
        cache, draft_cache = runner.allocate_cache(1, len(prompt)), runner.allocate_cache(1, len(prompt), num_layers=1)
        chunks = iter_prompt_chunks([prompt], 1, PREFILL_CHUNK_SIZE)
        next_chunks = iter_prompt_chunks([[*prompt[1:], 0]], 1, PREFILL_CHUNK_SIZE)
        for (start, tokens), (_, next_tokens) in zip(chunks, next_chunks, strict=True):
            with runner.announce_compile(f"prediction layer of {tokens.shape[1]} tokens", None, cache.capacity):
                cache, draft_cache, logits = mtp_chunk_logits(
                    runner.model, runner.params, cache, draft_cache, tokens, next_tokens, np.int32(start), last_position
                )
            parts.append(np.asarray(logits)[0, : len(prompt) - start])
    return np.concatenate(parts)


def stack_logits(logits: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Logits ``[T, V]`` of several prompts as one array ``[B, T, V]``, or as a list where the lengths differ."""
    return np.stack(logits) if len({array.shape for array in logits}) == 1 else list(logits)


def score_continuation(runner: ModelRunner, prompt: Sequence[int], continuation: Sequence[int]) -> Score:
    """Log-probability of a continuation after a prompt, in the model's own distribution.

    Args:
        runner: Runner of the model.
        prompt: Token ids of the prompt, at least one.
        continuation: Token ids of the continuation, at least one.
    """
    tokens = [*prompt, *continuation]
    # The logits at a position are those of the next token, so the last ones predict nothing here.
    logits = prompt_logits(runner, [tokens], start_position=len(prompt) - 1)[0][:-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    token_logprobs = logprobs[np.arange(len(continuation)), list(continuation)]
    return Score(float(token_logprobs.sum()), tuple(token_logprobs.tolist()), tuple(continuation))
