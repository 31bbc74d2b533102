"""Runs a batch of requests from prompt to end: prefill in chunks, then multi-step decode.

Requests of different lengths share a batch. Prompts are padded on the right; padding occupies cache slots that no token
of the sequence reads before a generated token has overwritten them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm_jax.cache.latent import LatentCache
from glm_jax.engine.compile_cache import compile_notice
from glm_jax.engine.metrics import Timing
from glm_jax.engine.outputs import StreamChunk, TokenLogprob
from glm_jax.engine.request import Request
from glm_jax.engine.scheduler import make_batches
from glm_jax.engine.steps import (
    DecodeOutput,
    DecodeState,
    bucket_size,
    decode_steps,
    prefill_chunk,
    start_decode,
)
from glm_jax.errors import GlmError
from glm_jax.memory import MemoryModel, prefill_chunk_length
from glm_jax.model.glm import GLM
from glm_jax.sampling import SamplerState
from glm_jax.weights.params import ParamTree

MAX_BATCHED_PREFILL_TOKENS = 8192  # per chunk, summed over the batch
MAX_DECODE_STEPS = 64  # per decode call
MIN_CHUNK_SIZE = 16
_FIRST_DECODE_STEPS = 4
_TARGET_DECODE_CALL_SECONDS = 0.25  # Ctrl-C waits for the end of a decode call
_MIN_CACHE_SLOTS = 128

PromptTokenIds = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunner:
    """Runs requests on a model whose parameters are on a device or a mesh.

    Attributes:
        model: Module.
        params: Parameters of the module.
        mesh: Mesh of the parameters, or None for one device.
        cache_dtype: Dtype of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`.
        valid_vocab_size: Token ids from here on are never sampled.
        unused_ids: Further token ids that are never sampled.
        eos_ids: Token ids that end a sequence, unless its options ignore them.
        max_model_len: Longest prompt and completion together, in tokens.
        memory_model: Memory model that limits batches, or None for no limit.
    """

    model: GLM
    params: ParamTree
    mesh: Mesh | None
    cache_dtype: str
    valid_vocab_size: int
    unused_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    max_model_len: int
    memory_model: MemoryModel | None = None

    def mesh_context(self) -> contextlib.AbstractContextManager[object]:
        """The context in which all device work must run."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def allocate_cache(self, batch_size: int, slots: int, num_layers: int | None = None) -> LatentCache:
        """An empty cache with at least ``slots`` slots per sequence, for ``num_layers`` layers (by default all)."""
        return LatentCache.create(
            self.model.cfg,
            batch_size,
            self._cache_capacity(slots),
            self.cache_dtype,
            layers=num_layers,
            rules=self.model.rules,
            mesh=self.mesh,
            dequant_dtype=default_cache_dtype(self.mesh, self.params["embed"].dtype),
        )

    def _cache_capacity(self, slots: int) -> int:
        return min(bucket_size(slots, _MIN_CACHE_SLOTS), max(self.max_model_len, slots))

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether the requests fit into memory as one batch."""
        if self.memory_model is None:
            return True
        slots = self._cache_capacity(_required_slots(requests))
        required = self.memory_model.requirement(bucket_size(len(requests)), slots).total
        num_prompts = len({request.prompt_ids for request in requests})
        if num_prompts < len(requests):
            # Requests of one prompt get copies of its cache; for a moment the original exists beside them.
            required += self.memory_model.requirement(bucket_size(num_prompts), slots).cache
        return required <= self.memory_model.device_bytes

    def run_all(
        self, requests: Sequence[Request], timing: Timing, *, stream: bool = False
    ) -> Iterator[tuple[Request, StreamChunk]]:
        """Runs any number of requests, batch after batch; arguments, chunks and errors are those of :meth:`run`."""
        for batch in make_batches(requests, self.fits):
            yield from self.run(batch, timing, stream=stream)

    def run(
        self, requests: Sequence[Request], timing: Timing, *, stream: bool = False
    ) -> Iterator[tuple[Request, StreamChunk]]:
        """Runs a batch of requests to their end and yields their text as it is generated.

        Args:
            requests: Requests of one batch; equal prompts are prefilled once.
            timing: Timing to update.
            stream: Decode one step per call instead of many.

        Yields:
            A request and its new chunk.

        Raises:
            GlmError: if the model's logits are not finite.
        """
        start, compile_s = time.perf_counter(), timing.compile_s
        with self.mesh_context():
            state, output = self._prefill_and_sample(requests, timing)
            chunks = _append_outputs(requests, state, output)
        seconds = time.perf_counter() - start
        timing.prefill_s += seconds - (timing.compile_s - compile_s)
        timing.first_token_s = timing.first_token_s or seconds
        timing.prompt_tokens += sum(len(prompt) for prompt in {request.prompt_ids for request in requests})
        timing.first_tokens += len(requests)
        timing.completion_tokens += len(requests)
        yield from chunks
        yield from self._decode_until_done(requests, state, timing, stream)

    def _decode_until_done(
        self, requests: Sequence[Request], state: DecodeState, timing: Timing, stream: bool
    ) -> Iterator[tuple[Request, StreamChunk]]:
        num_steps = 1 if stream else _FIRST_DECODE_STEPS
        while not all(request.finish_reason for request in requests):
            start, compile_s = time.perf_counter(), timing.compile_s
            with self.mesh_context():
                state, output = self._decode_multi_step(state, num_steps, timing)
                chunks = _append_outputs(requests, state, output)
                state = _mark_finished(requests, state)
            seconds = time.perf_counter() - start - (timing.compile_s - compile_s)
            timing.decode_s += seconds
            timing.completion_tokens += sum(len(chunk.token_ids) for _, chunk in chunks)
            yield from chunks
            if not stream:
                steps_in_target = num_steps * _TARGET_DECODE_CALL_SECONDS / seconds
                num_steps = int(np.clip(steps_in_target, 1, min(MAX_DECODE_STEPS, 2 * num_steps)))

    def announce_compile(
        self, description: str, timing: Timing | None, *key: Hashable
    ) -> contextlib.AbstractContextManager[None]:
        """Context of a call that compiles once for each ``key``; logs slow compilations and adds them to ``timing``."""
        dtype = jnp.dtype(self.params["embed"].dtype).name
        full_key = (self.model, dtype, self.mesh, self.cache_dtype, description, *key)
        return compile_notice(description, full_key, timing.add_compile if timing else None)

    def _decode_multi_step(
        self, state: DecodeState, num_steps: int, timing: Timing
    ) -> tuple[DecodeState, DecodeOutput]:
        batch, slots = state.cache.batch, state.cache.capacity
        description = f"decoding for {batch} sequence(s) of {slots:,} tokens"
        with self.announce_compile(description, timing, state.sampler.features):
            return decode_steps(self.model, self.params, state, np.int32(num_steps), steps=MAX_DECODE_STEPS)

    def _prefill_and_sample(self, requests: Sequence[Request], timing: Timing) -> tuple[DecodeState, DecodeOutput]:
        batch = bucket_size(len(requests))
        num_padding = batch - len(requests)
        padded = [*requests, *[requests[-1]] * num_padding]
        sampler = self._make_sampler_state(padded)  # raises on impossible options before anything runs
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        cache, logits, lengths = self.prefill(prompts, _required_slots(requests), timing)
        if len(prompts) < len(requests):
            # Each request of a shared prompt gets its own copy of the prompt's cache.
            prompt_rows = {prompt: i for i, prompt in enumerate(prompts)}
            rows = np.asarray([prompt_rows[request.prompt_ids] for request in requests] + [0] * num_padding, np.int32)
            cache, logits, lengths = cache.take(rows), logits[rows], lengths[rows]
        remaining = np.asarray([request.max_new_tokens for request in padded], np.int32)
        is_padding = np.arange(batch) >= len(requests)
        with self.announce_compile("sampling", timing, cache.data.shape, sampler.features):
            return start_decode(cache, logits, lengths, remaining, is_padding, sampler)

    def _make_sampler_state(self, requests: Sequence[Request]) -> SamplerState:
        return SamplerState.create(
            [request.params for request in requests],
            [request.seed for request in requests],
            [request.prompt_ids for request in requests],
            vocab_size=self.model.cfg.vocab_size,
            valid_vocab=self.valid_vocab_size,
            unused_ids=self.unused_ids,
            eos_ids=self.eos_ids,
        )

    def prefill(
        self, prompts: PromptTokenIds, min_slots: int, timing: Timing | None = None
    ) -> tuple[LatentCache, jax.Array, np.ndarray]:
        """Prefills a new cache chunk by chunk, so that activations do not grow with the length of the prompts.

        Args:
            prompts: Token ids of each prompt.
            min_slots: Least number of cache slots per sequence.
            timing: Timing to which compilations are added.

        Returns:
            The cache, the logits of each prompt's last token ``float32 [B, V]``, and the lengths ``int32 [B]``; B is
            the number of prompts padded to a power of two.
        """
        batch = bucket_size(len(prompts))
        lengths = np.asarray([len(prompt) for prompt in prompts] + [1] * (batch - len(prompts)), np.int32)
        cache = self.allocate_cache(batch, min_slots)
        logits = jnp.zeros((batch, self.model.cfg.vocab_size), jnp.float32)
        longest_chunk = prefill_chunk_length(batch, on_cpu=_is_on_cpu(self.mesh))
        chunk_size = min(longest_chunk, MAX_BATCHED_PREFILL_TOKENS // batch)
        for start, tokens in iter_prompt_chunks(prompts, batch, chunk_size):
            with self.announce_compile(f"prefill of {batch} x {tokens.shape[1]} tokens", timing, cache.capacity):
                cache, logits = prefill_chunk(self.model, self.params, cache, logits, tokens, np.int32(start), lengths)
        return cache, logits, lengths


def default_cache_dtype(mesh: Mesh | None, dtype: DTypeLike) -> str:
    """Dtype of the latent cache where none is chosen: ``dtype``, that of the activations, but float32 on a CPU.

    float32 holds the same values, and XLA:CPU would otherwise convert the whole cache at every layer.
    """
    return "float32" if _is_on_cpu(mesh) else jnp.dtype(dtype).name


def _is_on_cpu(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "cpu"


def _required_slots(requests: Sequence[Request]) -> int:
    return max(len(request.prompt_ids) + request.max_new_tokens for request in requests)


def iter_prompt_chunks(
    prompts: PromptTokenIds, batch_size: int, max_chunk_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Splits prompts into chunks of at most ``max_chunk_size`` tokens, with few different widths C.

    Yields:
        Position of the chunk's first token, and tokens ``int32 [batch_size, C]``, padded on the right.
    """
    start, longest = 0, max(map(len, prompts))
    max_chunk_size = max(max_chunk_size, MIN_CHUNK_SIZE)
    while start < longest:
        width = min(max_chunk_size, bucket_size(longest - start, MIN_CHUNK_SIZE))
        chunk = np.zeros((batch_size, width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens = prompt[start : start + width]
            chunk[row, : len(tokens)] = tokens
        yield start, chunk
        start += width


def _append_outputs(
    requests: Sequence[Request], state: DecodeState, output: DecodeOutput
) -> list[tuple[Request, StreamChunk]]:
    """Appends the output of a decode call to the requests; waits for the device."""
    finite, host_output = jax.device_get((state.finite, output))
    if not all(finite[: len(requests)]):
        raise GlmError("the model's logits are NaN or infinite: load with check=True to find damaged weights")
    chunks = []
    for row, request in enumerate(requests):
        if request.finish_reason:
            continue
        if chunk := request.append_tokens(*_output_of_row(host_output, row, request.params.logprobs)):
            chunks.append((request, chunk))
    return chunks


def _output_of_row(output: DecodeOutput, row: int, num_top: int | None) -> tuple[list[int], list[TokenLogprob] | None]:
    """Generated tokens of one sequence, with log-probabilities unless ``num_top`` is None."""
    padded = np.asarray(output.tokens[row])
    tokens: list[int] = padded[padded >= 0].tolist()
    if num_top is None or output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
        return tokens, None
    # The buffers are as wide as the longest decode call, and as deep as the most top tokens that a request needs.
    used = (row, slice(len(tokens)), slice(num_top))
    logprobs = output.logprobs[row].tolist()
    top_ids, top_logprobs = output.top_ids[used].tolist(), output.top_logprobs[used].tolist()
    tops = [
        tuple((i, logprob) for i, logprob in zip(ids, values, strict=True) if i >= 0)
        for ids, values in zip(top_ids, top_logprobs, strict=True)
    ]
    return tokens, [TokenLogprob(token, logprobs[step], tops[step]) for step, token in enumerate(tokens)]


def _mark_finished(requests: Sequence[Request], state: DecodeState) -> DecodeState:
    """Marks sequences as done that ended at a stop string, which only the host can see."""
    if not any(request.finish_reason and request.params.stop for request in requests):
        return state
    finished = np.ones(state.done.shape, bool)
    finished[: len(requests)] = [bool(request.finish_reason) for request in requests]
    return dataclasses.replace(state, done=state.done | finished)
