"""This program's side: the same compiled steps that :class:`glm_jax.LLM` runs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from glm_jax import checkpoint
from glm_jax.bench.backend import Loaded
from glm_jax.bench.hardware import PeakMemory
from glm_jax.bench.random_weights import random_params
from glm_jax.cache.latent import EIGHT_BITS, LatentCache, bytes_per_token
from glm_jax.checkpoint.sources.synthetic import PREFIX, SyntheticSpec
from glm_jax.config import Config
from glm_jax.engine import aot
from glm_jax.engine.runner import STEPS, Runner, plain_cache_dtype
from glm_jax.engine.steps import DecodeState, begin, bucket, decode_steps
from glm_jax.memory import distinct_experts, plan_on
from glm_jax.model.glm import GLM
from glm_jax.model.kernel_selection import by_kernels
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.weights import QuantRules
from glm_jax.weights.params import Tree, leaves
from glm_jax.weights.storage import Storage, plan_storage
from glm_jax.weights.tiling import has_tiles
from pallas_kernels import random_arrays as noise


@dataclasses.dataclass(slots=True)
class Started:
    """Rows that can be decoded from again and again.

    The cache is not put back: what a turn has written lies right of the rows' positions, and is written again.

    Attributes:
        cache: taken over by each turn, and given back.
        rest: everything else, on the host.
    """

    cache: LatentCache
    rest: dict[str, Any]

    @classmethod
    def of(cls, state: DecodeState) -> Started:
        """From a state, whose cache is taken over."""
        names = [field.name for field in dataclasses.fields(state) if field.name != "cache"]
        return cls(state.cache, {name: jax.device_get(getattr(state, name)) for name in names})

    def state(self) -> DecodeState:
        """The state again."""
        return DecodeState(cache=self.cache, **jax.tree.map(jnp.asarray, self.rest))


class Ours:
    """The model in JAX on its default device.

    Args:
        source: of the model.
        dtype: of activations, and of weights that are not quantised.
        quantize: a preset.
        cache_dtype: of the latent cache; that of the activations unless given.
        kernels: "triton", "reference", or what :meth:`glm_jax.LLM.load` would choose.
        name: in reports.

    Raises:
        GlmError: where kernels that are asked for cannot run the model.
        MemoryPlanError: where its weights do not fit.
    """

    def __init__(
        self,
        source: str,
        dtype: str,
        quantize: str | None = None,
        *,
        cache_dtype: str | None = None,
        kernels: str | None = None,
        name: str = "glm_jax",
    ) -> None:
        self.name, self.dtype = name, dtype
        started = time.perf_counter()
        with PeakMemory() as memory:
            self.cfg, self.params, self.storage = _load(source, dtype, quantize, kernels)
            jax.block_until_ready(self.params)
        self.by_kernels = has_tiles(self.params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.loaded = Loaded(seconds=time.perf_counter() - started, weight_bytes=size, peak_bytes=memory.peak)
        self.compile_seconds = 0.0
        self.cache_dtype = cache_dtype or plain_cache_dtype(None, dtype)
        self._runner = Runner(
            model=GLM(self.cfg),
            params=self.params,
            mesh=None,
            cache_dtype=self.cache_dtype,
            valid_vocab=self.cfg.vocab_size,
            unused_ids=(),
            eos_ids=self.cfg.eos_token_ids,
            max_len=self.cfg.max_position_embeddings,
        )
        self._warm: set[Any] = set()

    def prefill(self, prompts: np.ndarray) -> tuple[float, Any]:
        """As :meth:`glm_jax.bench.backend.Side.prefill`."""
        rows = prompts.tolist()
        self._first(("prefill", prompts.shape), lambda: self._runner.prefill(rows, prompts.shape[1]))
        started = time.perf_counter()
        _, logits, _ = jax.block_until_ready(self._runner.prefill(rows, prompts.shape[1]))
        seconds = time.perf_counter() - started
        return seconds, np.asarray(jnp.argmax(logits[: len(rows)], axis=-1))

    def start(self, prompts: np.ndarray, tokens: int) -> Started:
        """As :meth:`glm_jax.bench.backend.Side.start`."""
        count, length = prompts.shape
        cache, logits, lengths = self._runner.prefill(prompts.tolist(), length + tokens + 1)
        rows = len(lengths)  # a power of two
        left = np.full(rows, tokens + 1, np.int32)
        state, _ = begin(cache, logits, lengths, left, np.arange(rows) >= count, self._greedy(rows))
        return Started.of(state)

    def filled(self, batch: int, context: int, tokens: int) -> Started:
        """As after prompts of ``context`` tokens, whose rows in the cache are random; the same for every side."""
        rows = bucket(batch)
        shape = (self.cfg.num_hidden_layers, rows, slots(context, tokens), self.cfg.cache_width)
        kind = self.cache_dtype
        codes, scales = jax.jit(lambda: noise.cached_rows(shape, kind, context))()
        reads_as = plain_cache_dtype(None, self.params["embed"].dtype) if kind in EIGHT_BITS else None
        first = np.random.default_rng(context).integers(0, self.cfg.vocab_size, rows, np.int32)
        state = DecodeState(
            cache=LatentCache(codes, scales, reads_as),
            tokens=jnp.asarray(first),
            positions=jnp.full(rows, context, jnp.int32),
            left=jnp.full(rows, tokens + 1, jnp.int32),
            done=jnp.arange(rows, dtype=jnp.int32) >= batch,
            finite=jnp.ones(rows, bool),
            sampler=self._greedy(rows),
        )
        return Started.of(state)

    def decode(self, state: Started, tokens: int) -> tuple[float, np.ndarray]:
        """As :meth:`glm_jax.bench.backend.Side.decode`."""
        self._first(("decode", state.cache.data.shape), lambda: self._steps(state, 1))
        fresh = jax.block_until_ready(state.state())
        started = time.perf_counter()
        written = self._steps(state, tokens, fresh)
        return time.perf_counter() - started, written

    def launches(self, state: Started) -> dict[str, Any]:
        """What XLA makes of the generation loop on the device at hand (:func:`glm_jax.engine.aot.loop`)."""
        return aot.loop(GLM(self.cfg), self.params, state.state(), SingleDeviceSharding(jax.devices()[0]))

    def bytes_per_step(self, batch: int, context: int) -> int:
        """Bytes that are read to write one token in each of ``batch`` rows after ``context`` tokens."""
        return active_bytes(self.cfg, self.params, batch) + batch * context * bytes_per_token(
            self.cfg, self.cache_dtype
        )

    def _greedy(self, rows: int) -> SamplerState:
        return SamplerState.create(
            [SamplingParams(temperature=0.0, ignore_eos=True)] * rows,
            [0] * rows,
            [(0,)] * rows,  # what was in the prompt counts for penalties only
            vocab_size=self.cfg.vocab_size,
            valid_vocab=self.cfg.vocab_size,
            eos_ids=self.cfg.eos_token_ids,
        )

    def _steps(self, started: Started, tokens: int, state: DecodeState | None = None) -> np.ndarray:
        state, parts = state or started.state(), []
        for done in range(0, tokens, STEPS):
            limit = np.int32(min(STEPS, tokens - done))
            state, written = decode_steps(self._runner.model, self.params, state, limit, steps=STEPS)
            started.cache = state.cache
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


def slots(context: int, tokens: int) -> int:
    """Capacity of a cache for a context and the tokens after it, in whole blocks."""
    return -(-(context + tokens + 1) // 128) * 128


def _load(source: str, dtype: str, quantize: str | None, kernels: str | None) -> tuple[Config, Tree, Storage]:
    """The model without its prediction layer, which no peer loads, and how its weights are stored."""
    quant = QuantRules.named(quantize)
    if source.startswith(PREFIX) and quant is not None:
        spec = SyntheticSpec.parse(source)
        cfg = spec.cfg.replace(num_nextn_predict_layers=0)
        storage = plan_storage(cfg, quant)[0]
        tiles = _checked(cfg, storage, dtype, kernels)
        return cfg, random_params(cfg, quant, dtype, tiles=tiles, seed=spec.seed), storage
    weights = checkpoint.quantised(checkpoint.open_source(source, dtype=dtype), quant, dtype)
    tiles = _checked(weights.cfg, checkpoint.storage_of(weights), dtype, kernels)
    cfg, params, _ = checkpoint.load(weights, dtype=dtype, mtp=False, tiles=tiles)
    return cfg, params, checkpoint.storage_of(weights, cfg)


def _checked(cfg: Config, storage: Storage, dtype: str, kernels: str | None) -> bool:
    """Whether kernels run the model, which must fit, before anything of it is read or made."""
    plan_on(cfg, jax.devices()[:1], dtype=dtype, storage=storage, mtp=False, context=2).require()
    return by_kernels(cfg, storage, kernels, dtype)


def active_bytes(cfg: Config, params: Any, rows: int = 1) -> int:
    """Bytes of weights that the products of one token in each row read, as they are stored.

    Of the experts those that are chosen: by one token so many, by several as many as uniform routing would choose.
    """
    chosen = distinct_experts(cfg, rows) / cfg.n_routed_experts

    def read(path: tuple[str, ...], weight: Any) -> float:
        if path[0] == "mtp" or (path[0] == "embed" and not cfg.tie_word_embeddings):
            return 0 if path[0] == "mtp" else rows * weight.nbytes / cfg.vocab_size
        is_expert = path[-2:-1] == ("moe",) and path[-1] in ("gate", "up", "down")
        return weight.nbytes * (chosen if is_expert else 1)

    return round(sum(read(path, weight) for path, weight in leaves(params)))
