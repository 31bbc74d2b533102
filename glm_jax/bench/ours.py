"""This program's side: the same compiled steps that :class:`glm_jax.LLM` runs."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import checkpoint
from glm_jax.bench.machine import PeakMemory
from glm_jax.bench.side import Loaded
from glm_jax.config import Config
from glm_jax.decoding import STEPS, Runner
from glm_jax.model import GLM
from glm_jax.params import leaves
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.steps import DecodeState, begin, decode_steps


class Ours:
    """The model in JAX on its default device."""

    def __init__(self, source: str, dtype: str, quantize: str | None = None, name: str = "glm_jax") -> None:
        self.name = name
        started = time.perf_counter()
        with PeakMemory() as memory:
            # Without the prediction layer: the peer does not load it.
            self.cfg, params, _ = checkpoint.load(source, dtype=dtype, quantize=quantize, mtp=False)
            jax.block_until_ready(params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self.loaded = Loaded(seconds=time.perf_counter() - started, weight_bytes=size, peak_bytes=memory.peak)
        self.compile_seconds = 0.0
        self._read = active_bytes(self.cfg, params)
        wide_cache = jax.devices()[0].platform == "cpu"
        self._runner = Runner(
            model=GLM(self.cfg),
            params=params,
            mesh=None,
            cache_dtype=jnp.dtype(jnp.float32 if wide_cache else dtype),
            valid_vocab=self.cfg.vocab_size,
            unused_ids=(),
            eos_ids=self.cfg.eos_token_ids,
            max_len=self.cfg.max_position_embeddings,
        )
        self._warm: set[Any] = set()

    def prefill(self, prompts: np.ndarray) -> tuple[float, Any]:
        """As :meth:`glm_jax.bench.side.Side.prefill`."""
        rows = prompts.tolist()
        self._first(("prefill", prompts.shape), lambda: self._runner.prefill(rows, prompts.shape[1]))
        started = time.perf_counter()
        _, logits, _ = jax.block_until_ready(self._runner.prefill(rows, prompts.shape[1]))
        seconds = time.perf_counter() - started
        return seconds, np.asarray(jnp.argmax(logits[: len(rows)], axis=-1))

    def start(self, prompts: np.ndarray, tokens: int) -> DecodeState:
        """As :meth:`glm_jax.bench.side.Side.start`."""
        count, length = prompts.shape
        cache, logits, lengths = self._runner.prefill(prompts.tolist(), length + tokens + 1)
        rows = len(lengths)  # a power of two
        greedy = SamplingParams(temperature=0.0, ignore_eos=True)
        sampler = SamplerState.create(
            [greedy] * rows,
            [0] * rows,
            [tuple(prompts[min(row, count - 1)].tolist()) for row in range(rows)],
            vocab_size=self.cfg.vocab_size,
            valid_vocab=self.cfg.vocab_size,
            eos_ids=self.cfg.eos_token_ids,
        )
        left = np.full(rows, tokens + 1, np.int32)
        state, _ = begin(cache, logits, lengths, left, np.arange(rows) >= count, sampler)
        return state

    def decode(self, state: DecodeState, tokens: int) -> tuple[float, np.ndarray]:
        """As :meth:`glm_jax.bench.side.Side.decode`."""
        self._first(("decode", state.cache.data.shape), lambda: self._steps(_copy(state), 1))
        fresh = jax.block_until_ready(_copy(state))  # the steps take the state's memory
        started = time.perf_counter()
        written = self._steps(fresh, tokens)
        return time.perf_counter() - started, written

    def bytes_per_step(self) -> int:
        """Bytes of weights that one token reads: every matrix once, of the routed experts the chosen ones."""
        return self._read

    def _steps(self, state: DecodeState, tokens: int) -> np.ndarray:
        parts = []
        for done in range(0, tokens, STEPS):
            limit = np.int32(min(STEPS, tokens - done))
            state, written = decode_steps(self._runner.model, self._runner.params, state, limit, steps=STEPS)
            parts.append(np.asarray(written.tokens)[:, :limit])
        return np.concatenate(parts, axis=1)

    def _first(self, key: Any, call: Any) -> None:
        """Compiles by a first call, outside the timing, if this shape has not been called yet."""
        if key in self._warm:
            return
        started = time.perf_counter()
        jax.block_until_ready(call())
        self.compile_seconds += time.perf_counter() - started
        self._warm.add(key)


def active_bytes(cfg: Config, params: Any) -> int:
    """Bytes of weights that the products of one token read, as they are stored."""
    chosen = cfg.num_experts_per_tok / cfg.n_routed_experts

    def read(path: tuple[str, ...], weight: Any) -> float:
        if path[0] == "mtp" or (path[0] == "embed" and not cfg.tie_word_embeddings):
            return 0 if path[0] == "mtp" else weight.nbytes / cfg.vocab_size
        is_expert = path[-2:-1] == ("moe",) and path[-1] in ("gate", "up", "down")
        return weight.nbytes * (chosen if is_expert else 1)

    return round(sum(read(path, weight) for path, weight in leaves(params)))


def _copy(state: DecodeState) -> DecodeState:
    return jax.tree.map(jnp.copy, state)
