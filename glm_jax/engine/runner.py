"""A fixed batch of rows from prompt to end: prefill in chunks, then decode in bursts of steps.

Rows of different lengths share a batch: prompts are padded on the right, and padding lies in slots that no token of the
row can see before it has overwritten them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax.cache.latent import LatentCache
from glm_jax.engine.compile_cache import compile_notice
from glm_jax.engine.metrics import Timing
from glm_jax.engine.outputs import StreamChunk, TokenLogprob
from glm_jax.engine.request import Request
from glm_jax.engine.steps import (
    DecodeOutput,
    DecodeState,
    Params,
    bucket_size,
    decode_steps,
    prefill_chunk,
    start_decode,
)
from glm_jax.errors import GlmError
from glm_jax.memory import MemoryModel, prefill_chunk_length
from glm_jax.model.glm import GLM
from glm_jax.sampling import SamplerState

MAX_BATCHED_PREFILL_TOKENS = 8192  # of all rows
MAX_DECODE_STEPS = 64  # width of a burst's buffer
_TARGET_DECODE_CALL_SECONDS = 0.25  # how long the host may wait for a burst: what Ctrl-C waits for
_MIN_CACHE_SLOTS = 128
MIN_CHUNK_SIZE = 16

PromptTokenIds = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunner:
    """The model with its parameters on a device or a mesh.

    Attributes:
        model: the module.
        params: its parameters.
        mesh: of the parameters, or None for one device.
        cache_dtype: of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`.
        valid_vocab_size: ids from here on are never drawn.
        unused_ids: nor are these.
        eos_ids: end a row unless it ignores them.
        max_model_len: longest row, prompt and completion together.
        memory_model: the memory that was planned with, or None if nobody did.
    """

    model: GLM
    params: Params
    mesh: Mesh | None
    cache_dtype: Any
    valid_vocab_size: int
    unused_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    max_model_len: int
    memory_model: MemoryModel | None = None

    def mesh_context(self) -> contextlib.AbstractContextManager[Any]:
        """The context that all device work runs in."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def allocate_cache(self, batch_size: int, slots: int, num_layers: int | None = None) -> LatentCache:
        """An empty cache of at least ``slots`` slots, for all layers or for ``num_layers``."""
        cfg, capacity, rules = self.model.cfg, self._cache_capacity(slots), self.model.rules
        return LatentCache.create(
            cfg,
            batch_size,
            capacity,
            self.cache_dtype,
            layers=num_layers,
            rules=rules,
            mesh=self.mesh,
            dequant_dtype=default_cache_dtype(self.mesh, self.params["embed"].dtype),
        )

    def _cache_capacity(self, slots: int) -> int:
        return min(bucket_size(slots, _MIN_CACHE_SLOTS), max(self.max_model_len, slots))

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether these rows can be run together in the memory that was planned with."""
        if self.memory_model is None:
            return True
        prompts, slots = len({row.prompt_ids for row in requests}), self._cache_capacity(_required_slots(requests))
        # Completions of one prompt are copied from its cache, and for a moment both exist.
        copied = self.memory_model.requirement(bucket_size(prompts), slots).cache if prompts < len(requests) else 0
        return (
            self.memory_model.requirement(bucket_size(len(requests)), slots).total + copied
            <= self.memory_model.device_bytes
        )

    def run(
        self, requests: Sequence[Request], timing: Timing, *, stream: bool = False
    ) -> Iterator[tuple[Request, StreamChunk]]:
        """Writes all rows to their end, yielding pieces as they come.

        Args:
            requests: rows that share a prompt tuple are prefilled once.
            timing: filled in.
            stream: one step at a time.

        Raises:
            GlmError: if the model's logits are not finite.
        """
        started, compiling = time.perf_counter(), timing.compile_s
        with self.mesh_context():
            state, written = self._prefill_and_sample(requests, timing)
            pieces = _append_outputs(requests, state, written)
        seconds = time.perf_counter() - started
        timing.prefill_s += seconds - (timing.compile_s - compiling)
        timing.first_token_s = timing.first_token_s or seconds
        timing.prompt_tokens += sum(len(prompt) for prompt in {row.prompt_ids for row in requests})
        timing.first_tokens += len(requests)
        timing.completion_tokens += len(requests)
        yield from pieces
        yield from self._decode_until_done(requests, state, timing, stream)

    def _decode_until_done(
        self, requests: Sequence[Request], state: DecodeState, timing: Timing, stream: bool
    ) -> Iterator[tuple[Request, StreamChunk]]:
        limit = 1 if stream else 4
        while not all(row.finish_reason for row in requests):
            started, compiling = time.perf_counter(), timing.compile_s
            with self.mesh_context():
                state, written = self._decode_multi_step(state, limit, timing)
                pieces = _append_outputs(requests, state, written)
                state = _mark_finished(requests, state)
            seconds = time.perf_counter() - started - (timing.compile_s - compiling)
            timing.decode_s += seconds
            timing.completion_tokens += sum(len(piece.token_ids) for _, piece in pieces)
            yield from pieces
            if not stream:
                limit = int(np.clip(limit * _TARGET_DECODE_CALL_SECONDS / seconds, 1, min(MAX_DECODE_STEPS, 2 * limit)))

    def announce_compile(
        self, what: str, timing: Timing | None, *key: Hashable
    ) -> contextlib.AbstractContextManager[None]:
        """Round a call that compiles once for each ``key``."""
        mine = (self.model, jnp.dtype(self.params["embed"].dtype).name, self.mesh, str(self.cache_dtype), what, *key)
        return compile_notice(what, mine, timing.add_compile if timing else None)

    def _decode_multi_step(self, state: DecodeState, limit: int, timing: Timing) -> tuple[DecodeState, DecodeOutput]:
        rows, slots = state.cache.batch_size, state.cache.capacity
        with self.announce_compile(f"decoding for {rows} row(s) of {slots:,} tokens", timing, state.sampler.features):
            return decode_steps(self.model, self.params, state, np.int32(limit), steps=MAX_DECODE_STEPS)

    def _prefill_and_sample(self, requests: Sequence[Request], timing: Timing) -> tuple[DecodeState, DecodeOutput]:
        count = bucket_size(len(requests))
        padded = [*requests, *[requests[-1]] * (count - len(requests))]
        sampler = self._make_sampler_state(padded)  # refuses what is impossible before anything runs
        prompts = list(dict.fromkeys(row.prompt_ids for row in requests))
        cache, logits, lengths = self.prefill(prompts, _required_slots(requests), timing)
        if len(prompts) < len(requests):
            # Completions of one prompt each get a copy of its cache.
            order = {prompt: i for i, prompt in enumerate(prompts)}
            of_row = np.asarray([order[row.prompt_ids] for row in requests] + [0] * (count - len(requests)), np.int32)
            cache, logits, lengths = cache.select_rows(of_row), logits[of_row], lengths[of_row]
        budgets = np.asarray([row.max_new_tokens for row in padded], np.int32)
        filler = np.arange(count) >= len(requests)
        with self.announce_compile("sampling", timing, cache.data.shape, sampler.features):
            return start_decode(cache, logits, lengths, budgets, filler, sampler)

    def _make_sampler_state(self, requests: Sequence[Request]) -> SamplerState:
        return SamplerState.create(
            [row.params for row in requests],
            [row.seed for row in requests],
            [row.prompt_ids for row in requests],
            vocab_size=self.model.cfg.vocab_size,
            valid_vocab=self.valid_vocab_size,
            unused_ids=self.unused_ids,
            eos_ids=self.eos_ids,
        )

    def prefill(
        self, prompts: PromptTokenIds, min_slots: int, timing: Timing | None = None
    ) -> tuple[LatentCache, jax.Array, np.ndarray]:
        """Prompts into a new cache, chunk by chunk, so that memory does not grow with their length.

        Args:
            prompts: token ids.
            min_slots: that each row must have.
            timing: is told of compilations.

        Returns:
            The cache, logits float32 ``[P, V]`` of each prompt's last token, and lengths int32 ``[P]``; P is padded to
            a power of two.
        """
        count = bucket_size(len(prompts))
        lengths = np.asarray([len(p) for p in prompts] + [1] * (count - len(prompts)), np.int32)
        cache = self.allocate_cache(count, min_slots)
        logits = jnp.zeros((count, self.model.cfg.vocab_size), jnp.float32)
        widest = prefill_chunk_length(count, on_cpu=_on_cpu(self.mesh))
        for start, tokens in iter_prompt_chunks(prompts, count, min(widest, MAX_BATCHED_PREFILL_TOKENS // count)):
            with self.announce_compile(f"prefill of {count} x {tokens.shape[1]} tokens", timing, cache.capacity):
                cache, logits = prefill_chunk(self.model, self.params, cache, logits, tokens, np.int32(start), lengths)
        return cache, logits, lengths


def default_cache_dtype(mesh: Mesh | None, dtype: Any) -> str:
    """The weights', but on a CPU float32, which holds the same values: XLA:CPU would widen the cache at every layer."""
    return "float32" if _on_cpu(mesh) else jnp.dtype(dtype).name


def _on_cpu(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "cpu"


def _required_slots(requests: Sequence[Request]) -> int:
    return max(len(row.prompt_ids) + row.max_new_tokens for row in requests)


def iter_prompt_chunks(
    prompts: PromptTokenIds, batch_size: int, max_chunk_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Columns of the right-padded prompts, as (first position, int32 ``[count, C]``) with few different ``C``."""
    start, longest = 0, max(map(len, prompts))
    max_chunk_size = max(max_chunk_size, MIN_CHUNK_SIZE)
    while start < longest:
        width = min(max_chunk_size, bucket_size(longest - start, MIN_CHUNK_SIZE))
        block = np.zeros((batch_size, width), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            block[row, : len(part)] = part
        yield start, block
        start += width


def _append_outputs(
    requests: Sequence[Request], state: DecodeState, output: DecodeOutput
) -> list[tuple[Request, StreamChunk]]:
    """Hands each row what was written to it; waits for the device."""
    finite, new = jax.device_get((state.finite, output))
    if not all(finite[: len(requests)]):
        raise GlmError("the model's logits are NaN or infinite: load with check=True to find damaged weights")
    pieces = []
    for i, row in enumerate(requests):
        if not row.finish_reason and (piece := row.append_tokens(*_output_of_request(row, i, new))):
            pieces.append((row, piece))
    return pieces


def _output_of_request(request: Request, i: int, output: DecodeOutput) -> tuple[list[int], list[TokenLogprob] | None]:
    numbers = np.asarray(output.tokens[i])
    tokens: list[int] = numbers[numbers >= 0].tolist()
    wanted = request.params.logprobs
    if wanted is None or output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
        return tokens, None
    chosen, ids, values = output.logprobs[i].tolist(), output.top_ids[i].tolist(), output.top_logprobs[i].tolist()
    tops = [
        tuple((t, v) for t, v in zip(ids[j][:wanted], values[j][:wanted], strict=True) if t >= 0)
        for j in range(len(tokens))
    ]
    return tokens, [TokenLogprob(token, chosen[j], tops[j]) for j, token in enumerate(tokens)]


def _mark_finished(requests: Sequence[Request], state: DecodeState) -> DecodeState:
    """Tells the device of rows that only the host saw end, at a stop string."""
    if not any(row.finish_reason and row.params.stop for row in requests):
        return state
    ended = np.ones(state.done.shape, bool)
    ended[: len(requests)] = [bool(row.finish_reason) for row in requests]
    return dataclasses.replace(state, done=state.done | ended)
