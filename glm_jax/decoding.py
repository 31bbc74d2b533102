"""A fixed batch of rows from prompt to end: prefill in chunks, then decode in bursts of steps.

Rows of different lengths share a batch: prompts are padded on the right, and padding lies in slots that no token of the
row can see before it has overwritten them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax.cache import LatentCache
from glm_jax.completion import Piece, Timing, TokenLogprob
from glm_jax.errors import GlmError
from glm_jax.model import GLM
from glm_jax.rows import Row
from glm_jax.sampling import SamplerState
from glm_jax.steps import (
    DecodeState,
    Params,
    Written,
    begin,
    bucket,
    chunk_logits,
    compile_notice,
    decode_steps,
    prefill_chunk,
)

PREFILL_CHUNK = 512
STEPS = 64  # width of a burst's buffer
_BURST_SECONDS = 0.25  # how long the host may wait for a burst: what Ctrl-C waits for
_SMALLEST_CACHE = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """The model with its parameters on a device or a mesh.

    Attributes:
        model: the module.
        params: its parameters.
        mesh: of the parameters, or None for one device.
        cache_dtype: of the latent cache.
        valid_vocab: ids from here on are never drawn.
        max_len: longest row, prompt and completion together.
    """

    model: GLM
    params: Params
    mesh: Mesh | None
    cache_dtype: Any
    valid_vocab: int
    max_len: int

    def placed(self) -> contextlib.AbstractContextManager[Any]:
        """The context that all device work runs in."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def cache(self, rows: int, slots: int) -> LatentCache:
        """An empty cache of at least ``slots`` slots."""
        capacity = min(bucket(slots, _SMALLEST_CACHE), max(self.max_len, slots))
        cfg, rules = self.model.cfg, self.model.rules
        return LatentCache.create(cfg, rows, capacity, self.cache_dtype, rules=rules, mesh=self.mesh)

    def run(self, rows: Sequence[Row], timing: Timing, *, stream: bool = False) -> Iterator[tuple[Row, Piece]]:
        """Writes all rows to their end, yielding pieces as they come.

        Args:
            rows: rows that share a prompt tuple are prefilled once.
            timing: filled in.
            stream: one step at a time.

        Raises:
            GlmError: if the model's logits are not finite.
        """
        started = time.perf_counter()
        with self.placed():
            state, written = self._start(rows)
            pieces = self._feed(rows, state, written)
        timing.prefill_s += time.perf_counter() - started
        timing.first_token_s = timing.first_token_s or timing.prefill_s
        timing.prompt_tokens += sum(len(prompt) for prompt in {row.prompt_ids for row in rows})
        timing.first_tokens += len(rows)
        timing.completion_tokens += len(rows)
        yield from pieces
        yield from self._decode(rows, state, timing, stream)

    def _decode(
        self, rows: Sequence[Row], state: DecodeState, timing: Timing, stream: bool
    ) -> Iterator[tuple[Row, Piece]]:
        limit = 1 if stream else 4
        while not all(row.finish for row in rows):
            started = time.perf_counter()
            with self.placed():
                key = (self.model, state.tokens.shape[0], state.cache.capacity, state.sampler.features)
                with compile_notice(f"decoding for {key[1]} row(s) of {key[2]:,} tokens", ("decode", key)):
                    state, written = decode_steps(self.model, self.params, state, np.int32(limit), steps=STEPS)
                pieces = self._feed(rows, state, written)
                state = self._stop_ended(rows, state)
            seconds = time.perf_counter() - started
            timing.decode_s += seconds
            timing.completion_tokens += sum(len(piece.token_ids) for _, piece in pieces)
            yield from pieces
            if not stream:
                limit = int(np.clip(limit * _BURST_SECONDS / seconds, 1, min(STEPS, 2 * limit)))

    def _start(self, rows: Sequence[Row]) -> tuple[DecodeState, Written]:
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        slots = max(len(row.prompt_ids) + row.budget for row in rows)
        cache, logits, lengths = self.prefill(prompts, slots)
        count = bucket(len(rows))
        if len(prompts) < len(rows):
            # Completions of one prompt each get a copy of its cache.
            order = {prompt: i for i, prompt in enumerate(prompts)}
            of_row = np.asarray([order[row.prompt_ids] for row in rows] + [0] * (count - len(rows)), np.int32)
            cache, logits, lengths = LatentCache(cache.data[:, of_row]), logits[of_row], lengths[of_row]
        padded = [*rows, *[rows[-1]] * (count - len(rows))]
        sampler = SamplerState.create(
            [row.params for row in padded],
            [row.seed for row in padded],
            [row.prompt_ids for row in padded],
            vocab_size=self.model.cfg.vocab_size,
            valid_vocab=self.valid_vocab,
            eos_ids=self.model.cfg.eos_token_ids,
        )
        budgets = np.asarray([row.budget for row in padded], np.int32)
        filler = np.arange(count) >= len(rows)
        with compile_notice("sampling", ("begin", self.model, cache.data.shape, sampler.features)):
            return begin(cache, logits, lengths, budgets, filler, sampler)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: int) -> tuple[LatentCache, jax.Array, np.ndarray]:
        """Prompts into a new cache, chunk by chunk, so that memory does not grow with their length.

        Returns:
            The cache, logits float32 ``[P, V]`` of each prompt's last token, and lengths int32 ``[P]``, with P padded to
            a power of two.
        """
        count, longest = bucket(len(prompts)), max(map(len, prompts))
        lengths = np.asarray([len(p) for p in prompts] + [1] * (count - len(prompts)), np.int32)
        cache = self.cache(count, slots)
        logits = jnp.zeros((count, self.model.cfg.vocab_size), jnp.float32)
        for start, tokens in chunks(prompts, count, longest):
            key = (self.model, tokens.shape, cache.capacity)
            with compile_notice(f"prefill of {count} x {tokens.shape[1]} tokens", ("prefill", key)):
                cache, logits = prefill_chunk(self.model, self.params, cache, logits, tokens, np.int32(start), lengths)
        return cache, logits, lengths

    def all_logits(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits of every token of every row, float32 ``[T, V]`` each, on the host."""
        count, longest = bucket(len(prompts)), max(map(len, prompts))
        out: list[list[np.ndarray]] = [[] for _ in prompts]
        with self.placed():
            cache = self.cache(count, longest)
            for start, tokens in chunks(prompts, count, longest):
                key = (self.model, tokens.shape, cache.capacity)
                with compile_notice(f"logits of {count} x {tokens.shape[1]} tokens", ("logits", key)):
                    cache, logits = chunk_logits(self.model, self.params, cache, tokens, np.int32(start))
                host = np.asarray(logits)
                for row, prompt in enumerate(prompts):
                    if len(prompt) > start:
                        out[row].append(host[row, : len(prompt) - start])
        return [np.concatenate(parts) for parts in out]

    def _feed(self, rows: Sequence[Row], state: DecodeState, written: Written) -> list[tuple[Row, Piece]]:
        tokens, finite = jax.device_get((written.tokens, state.finite))
        numbers = jax.device_get((written.logprobs, written.top_ids, written.top_logprobs))
        pieces = []
        for i, row in enumerate(rows):
            if not finite[i]:
                raise GlmError("the model's logits are NaN or infinite: load with check=True to find damaged weights")
            new = tokens[i][tokens[i] >= 0].tolist()
            wanted = row.params.logprobs
            logprobs = None if wanted is None else _logprobs(new, *(x[i] for x in numbers), wanted)
            if not row.finish and (piece := row.feed(new, logprobs)):
                pieces.append((row, piece))
        return pieces

    def _stop_ended(self, rows: Sequence[Row], state: DecodeState) -> DecodeState:
        """Tells the device of rows that only the host saw end, at a stop string."""
        if not any(row.finish and row.params.stop for row in rows):
            return state
        ended = np.ones(state.done.shape, bool)
        ended[: len(rows)] = [bool(row.finish) for row in rows]
        return dataclasses.replace(state, done=state.done | ended)


def chunks(prompts: Sequence[Sequence[int]], count: int, longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Columns of the right-padded prompts, as (first position, int32 ``[count, C]``) with few different ``C``."""
    start = 0
    while start < longest:
        width = min(PREFILL_CHUNK, bucket(longest - start, 16))
        block = np.zeros((count, width), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            block[row, : len(part)] = part
        yield start, block
        start += width


def _logprobs(tokens: list[int], chosen: Any, ids: Any, values: Any, count: int) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token,
            float(chosen[j]),
            tuple((int(i), float(v)) for i, v in zip(ids[j][:count], values[j][:count], strict=True) if i >= 0),
        )
        for j, token in enumerate(tokens)
    ]
