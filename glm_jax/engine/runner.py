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
from glm_jax.engine.outputs import Piece, Timing, TokenLogprob
from glm_jax.engine.request import Row
from glm_jax.engine.steps import (
    DecodeState,
    Params,
    Written,
    begin,
    bucket,
    chunk_logits,
    decode_steps,
    mtp_chunk,
    prefill_chunk,
)
from glm_jax.errors import GlmError
from glm_jax.memory import PREFILL_CHUNK, Setup, chunk_length
from glm_jax.model.glm import GLM
from glm_jax.sampling import SamplerState

PREFILL_TOKENS = 8192  # of all rows
LOGITS_TOKENS = 1024  # with the logits of each: 600 MB of GLM-4.7-Flash's
STEPS = 64  # width of a burst's buffer
_BURST_SECONDS = 0.25  # how long the host may wait for a burst: what Ctrl-C waits for
_SMALLEST_CACHE = 128
_SMALLEST_CHUNK = 16

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """The model with its parameters on a device or a mesh.

    Attributes:
        model: the module.
        params: its parameters.
        mesh: of the parameters, or None for one device.
        cache_dtype: of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`.
        valid_vocab: ids from here on are never drawn.
        unused_ids: nor are these.
        eos_ids: end a row unless it ignores them.
        max_len: longest row, prompt and completion together.
        setup: the memory that was planned with, or None if nobody did.
    """

    model: GLM
    params: Params
    mesh: Mesh | None
    cache_dtype: Any
    valid_vocab: int
    unused_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    max_len: int
    setup: Setup | None = None

    def placed(self) -> contextlib.AbstractContextManager[Any]:
        """The context that all device work runs in."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def cache(self, rows: int, slots: int, layers: int | None = None) -> LatentCache:
        """An empty cache of at least ``slots`` slots, for all layers or for ``layers``."""
        cfg, capacity, rules = self.model.cfg, self._capacity(slots), self.model.rules
        return LatentCache.create(
            cfg,
            rows,
            capacity,
            self.cache_dtype,
            layers=layers,
            rules=rules,
            mesh=self.mesh,
            reads_as=plain_cache_dtype(self.mesh, self.params["embed"].dtype),
        )

    def _capacity(self, slots: int) -> int:
        return min(bucket(slots, _SMALLEST_CACHE), max(self.max_len, slots))

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether these rows can be run together in the memory that was planned with."""
        if self.setup is None:
            return True
        prompts, slots = len({row.prompt_ids for row in rows}), self._capacity(_slots(rows))
        # Completions of one prompt are copied from its cache, and for a moment both exist.
        copied = self.setup.need(bucket(prompts), slots).cache if prompts < len(rows) else 0
        return self.setup.need(bucket(len(rows)), slots).total + copied <= self.setup.device_bytes

    def run(self, rows: Sequence[Row], timing: Timing, *, stream: bool = False) -> Iterator[tuple[Row, Piece]]:
        """Writes all rows to their end, yielding pieces as they come.

        Args:
            rows: rows that share a prompt tuple are prefilled once.
            timing: filled in.
            stream: one step at a time.

        Raises:
            GlmError: if the model's logits are not finite.
        """
        started, compiling = time.perf_counter(), timing.compile_s
        with self.placed():
            state, written = self._start(rows, timing)
            pieces = _feed(rows, state, written)
        seconds = time.perf_counter() - started
        timing.prefill_s += seconds - (timing.compile_s - compiling)
        timing.first_token_s = timing.first_token_s or seconds
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
            started, compiling = time.perf_counter(), timing.compile_s
            with self.placed():
                state, written = self._burst(state, limit, timing)
                pieces = _feed(rows, state, written)
                state = _stop_ended(rows, state)
            seconds = time.perf_counter() - started - (timing.compile_s - compiling)
            timing.decode_s += seconds
            timing.completion_tokens += sum(len(piece.token_ids) for _, piece in pieces)
            yield from pieces
            if not stream:
                limit = int(np.clip(limit * _BURST_SECONDS / seconds, 1, min(STEPS, 2 * limit)))

    def _notice(self, what: str, timing: Timing | None, *key: Hashable) -> contextlib.AbstractContextManager[None]:
        """Round a call that compiles once for each ``key``."""
        mine = (self.model, jnp.dtype(self.params["embed"].dtype).name, self.mesh, str(self.cache_dtype), what, *key)
        return compile_notice(what, mine, timing.add_compile if timing else None)

    def _burst(self, state: DecodeState, limit: int, timing: Timing) -> tuple[DecodeState, Written]:
        rows, slots = state.cache.batch, state.cache.capacity
        with self._notice(f"decoding for {rows} row(s) of {slots:,} tokens", timing, state.sampler.features):
            return decode_steps(self.model, self.params, state, np.int32(limit), steps=STEPS)

    def _start(self, rows: Sequence[Row], timing: Timing) -> tuple[DecodeState, Written]:
        count = bucket(len(rows))
        padded = [*rows, *[rows[-1]] * (count - len(rows))]
        sampler = self._sampler(padded)  # refuses what is impossible before anything runs
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        cache, logits, lengths = self.prefill(prompts, _slots(rows), timing)
        if len(prompts) < len(rows):
            # Completions of one prompt each get a copy of its cache.
            order = {prompt: i for i, prompt in enumerate(prompts)}
            of_row = np.asarray([order[row.prompt_ids] for row in rows] + [0] * (count - len(rows)), np.int32)
            cache, logits, lengths = cache.take(of_row), logits[of_row], lengths[of_row]
        budgets = np.asarray([row.budget for row in padded], np.int32)
        filler = np.arange(count) >= len(rows)
        with self._notice("sampling", timing, cache.data.shape, sampler.features):
            return begin(cache, logits, lengths, budgets, filler, sampler)

    def _sampler(self, rows: Sequence[Row]) -> SamplerState:
        return SamplerState.create(
            [row.params for row in rows],
            [row.seed for row in rows],
            [row.prompt_ids for row in rows],
            vocab_size=self.model.cfg.vocab_size,
            valid_vocab=self.valid_vocab,
            unused_ids=self.unused_ids,
            eos_ids=self.eos_ids,
        )

    def prefill(
        self, prompts: Prompts, slots: int, timing: Timing | None = None
    ) -> tuple[LatentCache, jax.Array, np.ndarray]:
        """Prompts into a new cache, chunk by chunk, so that memory does not grow with their length.

        Args:
            prompts: token ids.
            slots: that each row must have.
            timing: is told of compilations.

        Returns:
            The cache, logits float32 ``[P, V]`` of each prompt's last token, and lengths int32 ``[P]``; P is padded to
            a power of two.
        """
        count = bucket(len(prompts))
        lengths = np.asarray([len(p) for p in prompts] + [1] * (count - len(prompts)), np.int32)
        cache = self.cache(count, slots)
        logits = jnp.zeros((count, self.model.cfg.vocab_size), jnp.float32)
        widest = chunk_length(count, on_cpu=_on_cpu(self.mesh))
        for start, tokens in chunks(prompts, count, min(widest, PREFILL_TOKENS // count)):
            with self._notice(f"prefill of {count} x {tokens.shape[1]} tokens", timing, cache.capacity):
                cache, logits = prefill_chunk(self.model, self.params, cache, logits, tokens, np.int32(start), lengths)
        return cache, logits, lengths

    def all_logits(self, prompts: Prompts, first: int = 0) -> list[np.ndarray]:
        """Logits of every token of every row, float32 ``[T, V]`` each, on the host; some rows at a time.

        Those before position ``first`` are left out.
        """
        width = min(PREFILL_CHUNK, bucket(max(map(len, prompts)), _SMALLEST_CHUNK))
        together = min(max(1, LOGITS_TOKENS // width), bucket(len(prompts)))
        groups = [prompts[i : i + together] for i in range(0, len(prompts), together)]
        with self.placed():
            return [row for group in groups for row in self._group_logits(group, together, first)]

    def mtp_logits(self, prompt: Sequence[int]) -> np.ndarray:
        """The prediction layer's logits of one row, float32 ``[T, V]``, on the host."""
        last, parts = np.int32(len(prompt) - 1), []
        with self.placed():
            cache, drafts = self.cache(1, len(prompt)), self.cache(1, len(prompt), layers=1)
            following = [tokens for _, tokens in chunks([[*prompt[1:], 0]], 1, PREFILL_CHUNK)]
            for (start, tokens), after in zip(chunks([prompt], 1, PREFILL_CHUNK), following, strict=True):
                with self._notice(f"prediction layer of {tokens.shape[1]} tokens", None, cache.capacity):
                    cache, drafts, logits = mtp_chunk(
                        self.model, self.params, cache, drafts, tokens, after, np.int32(start), last
                    )
                parts.append(np.asarray(logits)[0, : len(prompt) - start])
        return np.concatenate(parts)

    def _group_logits(self, prompts: Prompts, count: int, first: int) -> list[np.ndarray]:
        out: list[list[np.ndarray]] = [[] for _ in prompts]
        cache = self.cache(count, max(map(len, prompts)))
        for start, tokens in chunks(prompts, count, PREFILL_CHUNK):
            with self._notice(f"logits of {count} x {tokens.shape[1]} tokens", None, cache.capacity):
                cache, logits = chunk_logits(self.model, self.params, cache, tokens, np.int32(start))
            if start + tokens.shape[1] <= first:
                continue
            host = np.asarray(logits)
            for row, prompt in enumerate(prompts):
                if len(prompt) > start:
                    out[row].append(host[row, max(0, first - start) : len(prompt) - start])
        return [np.concatenate(parts) for parts in out]


def plain_cache_dtype(mesh: Mesh | None, dtype: Any) -> str:
    """The weights', but on a CPU float32, which holds the same values: XLA:CPU would widen the cache at every layer."""
    return "float32" if _on_cpu(mesh) else jnp.dtype(dtype).name


def _on_cpu(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "cpu"


def _slots(rows: Sequence[Row]) -> int:
    return max(len(row.prompt_ids) + row.budget for row in rows)


def chunks(prompts: Prompts, count: int, widest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Columns of the right-padded prompts, as (first position, int32 ``[count, C]``) with few different ``C``."""
    start, longest = 0, max(map(len, prompts))
    widest = max(widest, _SMALLEST_CHUNK)
    while start < longest:
        width = min(widest, bucket(longest - start, _SMALLEST_CHUNK))
        block = np.zeros((count, width), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            block[row, : len(part)] = part
        yield start, block
        start += width


def _feed(rows: Sequence[Row], state: DecodeState, written: Written) -> list[tuple[Row, Piece]]:
    """Hands each row what was written to it; waits for the device."""
    finite, new = jax.device_get((state.finite, written))
    if not all(finite[: len(rows)]):
        raise GlmError("the model's logits are NaN or infinite: load with check=True to find damaged weights")
    pieces = []
    for i, row in enumerate(rows):
        if not row.finish and (piece := row.feed(*_new_tokens(row, i, new))):
            pieces.append((row, piece))
    return pieces


def _new_tokens(row: Row, i: int, new: Written) -> tuple[list[int], list[TokenLogprob] | None]:
    numbers = np.asarray(new.tokens[i])
    tokens: list[int] = numbers[numbers >= 0].tolist()
    wanted = row.params.logprobs
    if wanted is None or new.logprobs is None or new.top_ids is None or new.top_logprobs is None:
        return tokens, None
    chosen, ids, values = new.logprobs[i].tolist(), new.top_ids[i].tolist(), new.top_logprobs[i].tolist()
    tops = [
        tuple((t, v) for t, v in zip(ids[j][:wanted], values[j][:wanted], strict=True) if t >= 0)
        for j in range(len(tokens))
    ]
    return tokens, [TokenLogprob(token, chosen[j], tops[j]) for j, token in enumerate(tokens)]


def _stop_ended(rows: Sequence[Row], state: DecodeState) -> DecodeState:
    """Tells the device of rows that only the host saw end, at a stop string."""
    if not any(row.finish and row.params.stop for row in rows):
        return state
    ended = np.ones(state.done.shape, bool)
    ended[: len(rows)] = [bool(row.finish) for row in rows]
    return dataclasses.replace(state, done=state.done | ended)
