"""The ``jit`` boundary: prompt chunks into the cache, many decode steps in one call.

What recompiles: the model, the number of rows and the cache's capacity (both come in powers of two, see
:func:`bucket_size`), the chunk length, the step buffer, and the sampler's static features. Everything else is data.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.cache.latent import LatentCache
from glm_jax.model.glm import GLM
from glm_jax.sampling import SampleResult, SamplerState, is_stop, sample, update_state
from pallas_kernels import CUDA_GRAPH_OPTIONS, MULTI_GPU_CUDA_GRAPH_OPTIONS

Params = dict[str, Any]
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """Rows being decoded; donated to every call and returned by it.

    Attributes:
        cache: latents of all tokens but the newest.
        tokens: int32 ``[B]``, the newest token of each row, not yet in the cache.
        positions: int32 ``[B]``, the position that ``tokens`` takes.
        remaining: int32 ``[B]``, tokens each row may still write.
        done: bool ``[B]``; a row that is done writes :data:`NO_TOKEN`.
        finite: bool ``[B]``; False once a row's logits held NaN or infinity.
        sampler: options and history of the rows.
    """

    cache: LatentCache
    tokens: jax.Array
    positions: jax.Array
    remaining: jax.Array
    done: jax.Array
    finite: jax.Array
    sampler: SamplerState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOutput:
    """What a call wrote, in step order; a row that was done has :data:`NO_TOKEN`.

    Attributes:
        tokens: int32 ``[B, n]``.
        logprobs: float32 ``[B, n]``, or None unless asked for.
        top_ids: int32 ``[B, n, k]``, or None.
        top_logprobs: float32 ``[B, n, k]``, or None.
    """

    tokens: jax.Array
    logprobs: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


def bucket_size(n: int, minimum: int = 1) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(minimum, 1 << (max(n, 1) - 1).bit_length())


def apply_model(model: GLM, params: Params, *inputs: Any, **options: Any) -> Any:
    """``model.apply`` on plain parameters."""
    return model.apply({"params": params}, *inputs, **options)


def prefill_chunk(
    model: GLM,
    params: Params,
    cache: LatentCache,
    logits: jax.Array,
    tokens: jax.Array | np.ndarray,
    start: jax.Array | np.int32,
    lengths: jax.Array | np.ndarray,
) -> tuple[LatentCache, jax.Array]:
    """Runs one chunk of every row's prompt.

    Args:
        cache: donated.
        logits: float32 ``[B, V]``, donated: of the last prompt token of rows that ended in an earlier chunk.
        tokens: int32 ``[B, C]``, padded on the right.
        start: int32, position of the chunk's first token.
        lengths: int32 ``[B]``, whole prompt lengths.

    Returns:
        The cache, and the logits with the rows that end in this chunk filled in.
    """
    return _jit_prefill(_graph_mode(model))(model, params, cache, logits, tokens, start, lengths)


@functools.cache
def _jit_prefill(graph_mode: str | None) -> Any:
    return jax.jit(
        prefill_program,
        static_argnames="model",
        donate_argnames=("cache", "logits"),
        compiler_options=_COMPILER_OPTIONS[graph_mode],
    )


def prefill_program(
    model: GLM,
    params: Params,
    cache: LatentCache,
    logits: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
) -> tuple[LatentCache, jax.Array]:
    """What :func:`prefill_chunk` compiles."""
    chunk = tokens.shape[1]
    positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32)[None], tokens.shape)
    last = lengths - 1 - start
    here = (last >= 0) & (last < chunk)
    fresh, cache = apply_model(model, params, tokens, positions, cache, logits_at=jnp.clip(last, 0, chunk - 1))
    return cache, jnp.where(here[:, None], fresh[:, 0], logits)


@functools.partial(jax.jit, donate_argnames="cache")
def start_decode(
    cache: LatentCache,
    logits: jax.Array,
    lengths: jax.Array,
    remaining: jax.Array,
    done: jax.Array,
    sampler: SamplerState,
) -> tuple[DecodeState, DecodeOutput]:
    """Draws the first token of every row.

    Args:
        cache: of the prompts, donated.
        logits: float32 ``[B, V]`` of the prompts' last tokens.
        lengths: int32 ``[B]``, of the prompts.
        remaining: int32 ``[B]``, tokens each row may write.
        done: bool ``[B]``, True for rows that only fill up the batch.
        sampler: of the rows.
    """
    result = sample(logits, sampler, lengths)
    state = DecodeState(
        cache=cache,
        tokens=result.tokens,
        positions=lengths,
        remaining=remaining,
        done=done,
        finite=jnp.ones_like(done),
        sampler=sampler,
    )
    state, written = _advance_state(state, result)
    return state, jax.tree.map(lambda x: x[:, None], written)


def decode_steps(
    model: GLM, params: Params, state: DecodeState, limit: jax.Array | np.int32, *, steps: int
) -> tuple[DecodeState, DecodeOutput]:
    """Up to ``min(limit, steps)`` decode steps without a host in between; ends early when every row is done.

    Args:
        state: donated.
        limit: int32, steps to run now; data, so that streaming and bulk share one compilation.
        steps: width of the output buffer.
    """
    return _jit_decode(_graph_mode(model))(model, params, state, limit, steps=steps)


def _graph_mode(model: GLM) -> str | None:
    """Which options the programs of a model are compiled with."""
    if jax.default_backend() != "gpu":
        return None
    return "several" if model.rules.mesh_axes else "one"


_COMPILER_OPTIONS = {None: None, "one": CUDA_GRAPH_OPTIONS, "several": MULTI_GPU_CUDA_GRAPH_OPTIONS}


@functools.cache
def _jit_decode(graph_mode: str | None) -> Any:
    return jax.jit(
        decode_program,
        static_argnames=("model", "steps"),
        donate_argnames="state",
        compiler_options=_COMPILER_OPTIONS[graph_mode],
    )


def decode_program(
    model: GLM, params: Params, state: DecodeState, limit: jax.Array, *, steps: int
) -> tuple[DecodeState, DecodeOutput]:
    """What :func:`decode_steps` compiles."""
    buffer = _empty_output(state, steps)

    def go_on(carry: tuple[jax.Array, DecodeState, DecodeOutput]) -> jax.Array:
        step, state, _ = carry
        return (step < limit) & (step < steps) & ~jnp.all(state.done)

    def one(carry: tuple[jax.Array, DecodeState, DecodeOutput]) -> tuple[jax.Array, DecodeState, DecodeOutput]:
        step, state, buffer = carry
        newest = (state.tokens[:, None], state.positions[:, None])
        result, cache = apply_model(model, params, *newest, state.cache, state.sampler, method="decode_and_sample")
        positions = jnp.where(state.done, state.positions, state.positions + 1)
        state = dataclasses.replace(state, cache=cache, positions=positions)
        state, written = _advance_state(state, result)
        return step + 1, state, jax.tree.map(lambda all_, new: all_.at[:, step].set(new), buffer, written)

    _, state, buffer = jax.lax.while_loop(go_on, one, (jnp.int32(0), state, buffer))
    return state, buffer


def _advance_state(state: DecodeState, result: SampleResult) -> tuple[DecodeState, DecodeOutput]:
    """The state after a draw: rows that hit a stop token or their budget are done with it."""
    active = ~state.done
    tokens = jnp.where(active, result.tokens, NO_TOKEN)
    remaining = state.remaining - active.astype(jnp.int32)
    done = state.done | is_stop(result.tokens, state.sampler) | (remaining <= 0)
    state = dataclasses.replace(
        state,
        tokens=jnp.where(active, result.tokens, 0),
        remaining=remaining,
        done=done,
        finite=state.finite & (result.ok | ~active),
        sampler=update_state(state.sampler, result.tokens, active),
    )
    return state, DecodeOutput(
        tokens=tokens, logprobs=result.logprob, top_ids=result.top_ids, top_logprobs=result.top_logprobs
    )


def _empty_output(state: DecodeState, steps: int) -> DecodeOutput:
    rows, count = state.tokens.shape[0], state.sampler.features.logprobs
    numbers = count is not None
    return DecodeOutput(
        tokens=jnp.full((rows, steps), NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros((rows, steps), jnp.float32) if numbers else None,
        top_ids=jnp.full((rows, steps, count), NO_TOKEN, jnp.int32) if numbers else None,
        top_logprobs=jnp.zeros((rows, steps, count), jnp.float32) if numbers else None,
    )
