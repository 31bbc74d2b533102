"""The compiled functions: prefill of one chunk, the first token, multi-step decode.

A new program is compiled for each model, batch size and cache capacity (both are powers of two, see
:func:`bucket_size`), chunk length, output buffer width, and set of static sampler features. Everything else is data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.cache.latent import LatentCache
from glm_jax.model.glm import GLM
from glm_jax.model.hooks import EditFn
from glm_jax.ops.mla import AttentionForm
from glm_jax.sampling import SampleResult, SamplerState, is_stop, sample, update_state
from glm_jax.sampling.batch_arrays import NO_TOKEN as NO_TOKEN
from glm_jax.weights.params import ParamTree
from pallas_kernels import CUDA_GRAPH_OPTIONS, MULTI_GPU_CUDA_GRAPH_OPTIONS

_GraphMode: TypeAlias = Literal["one GPU", "several GPUs"] | None
_COMPILER_OPTIONS = {None: None, "one GPU": CUDA_GRAPH_OPTIONS, "several GPUs": MULTI_GPU_CUDA_GRAPH_OPTIONS}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """State of a batch of sequences between decode calls; every call donates it and returns the next one.

    Attributes:
        cache: Latents of all tokens except the newest.
        tokens: ``int32 [B]``, newest token of each sequence, not yet in the cache.
        positions: ``int32 [B]``, position of ``tokens``.
        remaining: ``int32 [B]``, tokens that each sequence may still generate.
        done: ``bool [B]``; a finished sequence outputs :data:`NO_TOKEN`.
        finite: ``bool [B]``; False once the logits of a sequence contained NaN or infinity.
        sampler: Sampling options and token history of each sequence.
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
    """Output of n decode steps, in step order; the other three are None unless a sequence needs log-probabilities.

    Attributes:
        tokens: ``int32 [B, n]``, generated tokens; :data:`NO_TOKEN` where a sequence was finished.
        logprobs: ``float32 [B, n]``, log-probability of each token.
        top_ids: ``int32 [B, n, k]``, the k most likely tokens.
        top_logprobs: ``float32 [B, n, k]``, log-probabilities of ``top_ids``.
    """

    tokens: jax.Array
    logprobs: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


def bucket_size(n: int, minimum: int = 1) -> int:
    """The next power of two at or above ``n``, at least ``minimum``, so that few shapes are compiled."""
    return max(minimum, 1 << (max(n, 1) - 1).bit_length())


@overload
def apply_model(
    model: GLM,
    params: ParamTree,
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    *,
    method: Literal["__call__", "hidden"] = ...,
    logits_at: jax.Array | None = ...,
) -> tuple[jax.Array, LatentCache]: ...
@overload
def apply_model(
    model: GLM,
    params: ParamTree,
    tokens: jax.Array,
    *,
    trace: tuple[str, ...],
    edit: Mapping[str, EditFn],
    attention: AttentionForm = ...,
) -> tuple[jax.Array, None, dict[str, jax.Array]]: ...
@overload
def apply_model(model: GLM, params: ParamTree, hidden: jax.Array, *, method: Literal["head"]) -> jax.Array: ...
@overload
def apply_model(
    model: GLM,
    params: ParamTree,
    hidden: jax.Array,
    next_tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    *,
    method: Literal["draft"],
) -> tuple[jax.Array, jax.Array, LatentCache]: ...
@overload
def apply_model(
    model: GLM,
    params: ParamTree,
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    sampler: SamplerState,
    *,
    method: Literal["decode_and_sample"],
) -> tuple[SampleResult, LatentCache]: ...
def apply_model(model: GLM, params: ParamTree, *inputs: Any, **options: Any) -> object:
    """Calls a method of :class:`~glm_jax.GLM` with the given parameters: ``model.apply`` with types."""
    return model.apply({"params": params}, *inputs, **options)


def prefill_chunk(
    model: GLM,
    params: ParamTree,
    cache: LatentCache,
    logits: jax.Array,
    tokens: jax.Array | np.ndarray,
    start: jax.Array | np.int32,
    lengths: jax.Array | np.ndarray,
) -> tuple[LatentCache, jax.Array]:
    """Runs one chunk of C tokens of every prompt.

    Args:
        model: Module.
        params: Parameters of the module.
        cache: Latents of the earlier chunks; donated.
        logits: ``float32 [B, V]``, logits of the last token of each prompt that ended in an earlier chunk; donated.
        tokens: ``int32 [B, C]``, padded on the right.
        start: ``int32 []``, position of the first token of the chunk.
        lengths: ``int32 [B]``, lengths of the whole prompts.

    Returns:
        The cache, and the logits ``float32 [B, V]`` with those of the prompts that end in this chunk filled in.
    """
    return _jit_prefill(_graph_mode(model))(model, params, cache, logits, tokens, start, lengths)


@functools.cache
def _jit_prefill(graph_mode: _GraphMode) -> jax.stages.Wrapped:
    return jax.jit(
        prefill_program,
        static_argnames="model",
        donate_argnames=("cache", "logits"),
        compiler_options=_COMPILER_OPTIONS[graph_mode],
    )


def prefill_program(
    model: GLM,
    params: ParamTree,
    cache: LatentCache,
    logits: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
) -> tuple[LatentCache, jax.Array]:
    """The function that :func:`prefill_chunk` compiles."""
    width = tokens.shape[1]
    positions = jnp.broadcast_to(start + jnp.arange(width, dtype=jnp.int32)[None], tokens.shape)
    last = lengths - 1 - start
    ends_here = (last >= 0) & (last < width)
    last_logits, cache = apply_model(model, params, tokens, positions, cache, logits_at=jnp.clip(last, 0, width - 1))
    return cache, jnp.where(ends_here[:, None], last_logits[:, 0], logits)


@functools.partial(jax.jit, donate_argnames="cache")
def start_decode(
    cache: LatentCache,
    logits: jax.Array,
    lengths: jax.Array,
    remaining: jax.Array,
    done: jax.Array,
    sampler: SamplerState,
) -> tuple[DecodeState, DecodeOutput]:
    """Samples the first token of every sequence.

    Args:
        cache: Latents of the prompts; donated.
        logits: ``float32 [B, V]``, logits of the last prompt tokens.
        lengths: ``int32 [B]``, lengths of the prompts.
        remaining: ``int32 [B]``, tokens that each sequence may generate.
        done: ``bool [B]``, True for sequences that only pad the batch.
        sampler: Sampling options and token history of each sequence.

    Returns:
        The state for :func:`decode_steps`, and the output of this one step.
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
    state, output = _advance_state(state, result)
    return state, jax.tree.map(lambda x: x[:, None], output)


def decode_steps(
    model: GLM, params: ParamTree, state: DecodeState, limit: jax.Array | np.int32, *, steps: int
) -> tuple[DecodeState, DecodeOutput]:
    """Multi-step decode: up to ``min(limit, steps)`` steps on the device in one call.

    The loop ends early when every sequence is finished.

    Args:
        model: Module.
        params: Parameters of the module.
        state: State of the batch; donated.
        limit: ``int32 []``, steps to run; it is data, so that streaming and bulk generation share one program.
        steps: Width of the output buffer.

    Returns:
        The next state, and the output, padded with :data:`NO_TOKEN` to ``steps`` columns.
    """
    return _jit_decode(_graph_mode(model))(model, params, state, limit, steps=steps)


def _graph_mode(model: GLM) -> _GraphMode:
    """Key of the compiler options for a model on the default backend."""
    if jax.default_backend() != "gpu":
        return None
    return "several GPUs" if model.rules.mesh_axes else "one GPU"


@functools.cache
def _jit_decode(graph_mode: _GraphMode) -> jax.stages.Wrapped:
    return jax.jit(
        decode_program,
        static_argnames=("model", "steps"),
        donate_argnames="state",
        compiler_options=_COMPILER_OPTIONS[graph_mode],
    )


def decode_program(
    model: GLM, params: ParamTree, state: DecodeState, limit: jax.Array, *, steps: int
) -> tuple[DecodeState, DecodeOutput]:
    """The function that :func:`decode_steps` compiles."""

    def should_continue(carry: tuple[jax.Array, DecodeState, DecodeOutput]) -> jax.Array:
        step, state, _ = carry
        return (step < limit) & (step < steps) & ~jnp.all(state.done)

    def decode_step(carry: tuple[jax.Array, DecodeState, DecodeOutput]) -> tuple[jax.Array, DecodeState, DecodeOutput]:
        step, state, outputs = carry
        newest = (state.tokens[:, None], state.positions[:, None])
        result, cache = apply_model(model, params, *newest, state.cache, state.sampler, method="decode_and_sample")
        positions = jnp.where(state.done, state.positions, state.positions + 1)
        state = dataclasses.replace(state, cache=cache, positions=positions)
        state, output = _advance_state(state, result)
        outputs = jax.tree.map(lambda buffer, new: buffer.at[:, step].set(new), outputs, output)
        return step + 1, state, outputs

    carry = (jnp.int32(0), state, _empty_output(state, steps))
    _, state, outputs = jax.lax.while_loop(should_continue, decode_step, carry)
    return state, outputs


def _advance_state(state: DecodeState, result: SampleResult) -> tuple[DecodeState, DecodeOutput]:
    """The state after a step, whose tokens finish the sequences that reach a stop token or their last token."""
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
    batch, num_top = state.tokens.shape[0], state.sampler.features.logprobs
    tokens = jnp.full((batch, steps), NO_TOKEN, jnp.int32)
    if num_top is None:
        return DecodeOutput(tokens=tokens, logprobs=None, top_ids=None, top_logprobs=None)
    return DecodeOutput(
        tokens=tokens,
        logprobs=jnp.zeros((batch, steps), jnp.float32),
        top_ids=jnp.full((batch, steps, num_top), NO_TOKEN, jnp.int32),
        top_logprobs=jnp.zeros((batch, steps, num_top), jnp.float32),
    )
