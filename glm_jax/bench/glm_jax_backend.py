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
from glm_jax.bench.backend import LoadStats
from glm_jax.bench.hardware import PeakMemoryMonitor
from glm_jax.bench.random_weights import random_quantized_params
from glm_jax.cache.latent import QUANTIZED_CACHE_MAX, LatentCache, bytes_per_token
from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX, SyntheticSpec
from glm_jax.config import Config
from glm_jax.engine import aot
from glm_jax.engine.runner import MAX_DECODE_STEPS, ModelRunner, default_cache_dtype
from glm_jax.engine.steps import DecodeState, bucket_size, decode_steps, start_decode
from glm_jax.memory import expected_active_experts, plan_memory_on_devices
from glm_jax.model.glm import GLM
from glm_jax.model.kernel_selection import select_kernels
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.weights import QuantRules
from glm_jax.weights.params import ParamTree, leaves_with_path
from glm_jax.weights.storage import Storage, plan_storage
from glm_jax.weights.tiling import has_tiled_weights
from pallas_kernels import random_arrays


@dataclasses.dataclass(slots=True)
class DecodeSnapshot:
    """Rows that can be decoded from again and again.

    The cache is not put back: what a turn has written lies right of the rows' positions, and is written again.

    Attributes:
        cache: taken over by each turn, and given back.
        host_state: everything else, on the host.
    """

    cache: LatentCache
    host_state: dict[str, Any]

    @classmethod
    def from_state(cls, state: DecodeState) -> DecodeSnapshot:
        """From a state, whose cache is taken over."""
        names = [field.name for field in dataclasses.fields(state) if field.name != "cache"]
        return cls(state.cache, {name: jax.device_get(getattr(state, name)) for name in names})

    def to_state(self) -> DecodeState:
        """The state again."""
        return DecodeState(cache=self.cache, **jax.tree.map(jnp.asarray, self.host_state))


class GlmJaxBackend:
    """The model in JAX on its default device.

    Args:
        source: of the model.
        dtype: of activations, and of weights that are not quantized.
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
        with PeakMemoryMonitor() as memory:
            self.cfg, self.params, self.storage = _load(source, dtype, quantize, kernels)
            jax.block_until_ready(self.params)
        self.use_kernels = has_tiled_weights(self.params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.loaded = LoadStats(seconds=time.perf_counter() - started, weight_bytes=size, peak_bytes=memory.peak)
        self.compile_seconds = 0.0
        self.cache_dtype = cache_dtype or default_cache_dtype(None, dtype)
        self._runner = ModelRunner(
            model=GLM(self.cfg),
            params=self.params,
            mesh=None,
            cache_dtype=self.cache_dtype,
            valid_vocab_size=self.cfg.vocab_size,
            unused_ids=(),
            eos_ids=self.cfg.eos_token_ids,
            max_model_len=self.cfg.max_position_embeddings,
        )
        self._compiled_shapes: set[Any] = set()

    def prefill(self, prompts: np.ndarray) -> tuple[float, Any]:
        """As :meth:`glm_jax.bench.backend.Side.prefill`."""
        rows = prompts.tolist()
        self._warm_up(("prefill", prompts.shape), lambda: self._runner.prefill(rows, prompts.shape[1]))
        started = time.perf_counter()
        _, logits, _ = jax.block_until_ready(self._runner.prefill(rows, prompts.shape[1]))
        seconds = time.perf_counter() - started
        return seconds, np.asarray(jnp.argmax(logits[: len(rows)], axis=-1))

    def start(self, prompts: np.ndarray, tokens: int) -> DecodeSnapshot:
        """As :meth:`glm_jax.bench.backend.Side.start`."""
        count, length = prompts.shape
        cache, logits, lengths = self._runner.prefill(prompts.tolist(), length + tokens + 1)
        rows = len(lengths)  # a power of two
        left = np.full(rows, tokens + 1, np.int32)
        state, _ = start_decode(cache, logits, lengths, left, np.arange(rows) >= count, self._greedy_sampler(rows))
        return DecodeSnapshot.from_state(state)

    def start_with_random_cache(self, batch: int, context: int, tokens: int) -> DecodeSnapshot:
        """As after prompts of ``context`` tokens, whose rows in the cache are random; the same for every side."""
        rows = bucket_size(batch)
        shape = (self.cfg.num_hidden_layers, rows, cache_capacity(context, tokens), self.cfg.cache_width)
        kind = self.cache_dtype
        codes, scales = jax.jit(lambda: random_arrays.random_cache_rows(shape, kind, context))()
        reads_as = default_cache_dtype(None, self.params["embed"].dtype) if kind in QUANTIZED_CACHE_MAX else None
        first = np.random.default_rng(context).integers(0, self.cfg.vocab_size, rows, np.int32)
        state = DecodeState(
            cache=LatentCache(codes, scales, reads_as),
            tokens=jnp.asarray(first),
            positions=jnp.full(rows, context, jnp.int32),
            remaining=jnp.full(rows, tokens + 1, jnp.int32),
            done=jnp.arange(rows, dtype=jnp.int32) >= batch,
            finite=jnp.ones(rows, bool),
            sampler=self._greedy_sampler(rows),
        )
        return DecodeSnapshot.from_state(state)

    def decode(self, state: DecodeSnapshot, tokens: int) -> tuple[float, np.ndarray]:
        """As :meth:`glm_jax.bench.backend.Side.decode`."""
        self._warm_up(("decode", state.cache.data.shape), lambda: self._run_decode_steps(state, 1))
        fresh = jax.block_until_ready(state.to_state())
        started = time.perf_counter()
        written = self._run_decode_steps(state, tokens, fresh)
        return time.perf_counter() - started, written

    def compile_stats(self, state: DecodeSnapshot) -> dict[str, Any]:
        """What XLA makes of the generation loop on the device at hand (:func:`glm_jax.engine.aot.compile_decode_loop`)."""
        return aot.compile_decode_loop(
            GLM(self.cfg), self.params, state.to_state(), SingleDeviceSharding(jax.devices()[0])
        )

    def bytes_per_step(self, batch: int, context: int) -> int:
        """Bytes that are read to write one token in each of ``batch`` rows after ``context`` tokens."""
        return active_weight_bytes(self.cfg, self.params, batch) + batch * context * bytes_per_token(
            self.cfg, self.cache_dtype
        )

    def _greedy_sampler(self, rows: int) -> SamplerState:
        return SamplerState.create(
            [SamplingParams(temperature=0.0, ignore_eos=True)] * rows,
            [0] * rows,
            [(0,)] * rows,  # what was in the prompt counts for penalties only
            vocab_size=self.cfg.vocab_size,
            valid_vocab=self.cfg.vocab_size,
            eos_ids=self.cfg.eos_token_ids,
        )

    def _run_decode_steps(self, started: DecodeSnapshot, tokens: int, state: DecodeState | None = None) -> np.ndarray:
        state, parts = state or started.to_state(), []
        for done in range(0, tokens, MAX_DECODE_STEPS):
            limit = np.int32(min(MAX_DECODE_STEPS, tokens - done))
            state, written = decode_steps(self._runner.model, self.params, state, limit, steps=MAX_DECODE_STEPS)
            started.cache = state.cache
            parts.append(np.asarray(written.tokens)[:, :limit])
        return np.concatenate(parts, axis=1)

    def _warm_up(self, key: Any, call: Any) -> None:
        """Compiles by a first call, outside the timing, if this shape has not been called yet."""
        if key in self._compiled_shapes:
            return
        started = time.perf_counter()
        jax.block_until_ready(call())
        self.compile_seconds += time.perf_counter() - started
        self._compiled_shapes.add(key)


def cache_capacity(context: int, tokens: int) -> int:
    """Capacity of a cache for a context and the tokens after it, in whole blocks."""
    return -(-(context + tokens + 1) // 128) * 128


def _load(source: str, dtype: str, quantize: str | None, kernels: str | None) -> tuple[Config, ParamTree, Storage]:
    """The model without its prediction layer, which no peer loads, and how its weights are stored."""
    quant = QuantRules.resolve(quantize)
    if source.startswith(SYNTHETIC_PREFIX) and quant is not None:
        spec = SyntheticSpec.parse(source)
        cfg = spec.cfg.replace(num_nextn_predict_layers=0)
        storage = plan_storage(cfg, quant)[0]
        tiles = _select_tiles(cfg, storage, dtype, kernels)
        return cfg, random_quantized_params(cfg, quant, dtype, tiles=tiles, seed=spec.seed), storage
    weights = checkpoint.quantize_source(checkpoint.open_source(source, dtype=dtype), quant, dtype)
    tiles = _select_tiles(weights.cfg, checkpoint.source_storage(weights), dtype, kernels)
    cfg, params, _ = checkpoint.load(weights, dtype=dtype, mtp=False, tiles=tiles)
    return cfg, params, checkpoint.source_storage(weights, cfg)


def _select_tiles(cfg: Config, storage: Storage, dtype: str, kernels: str | None) -> bool:
    """Whether kernels run the model, which must fit, before anything of it is read or made."""
    plan_memory_on_devices(cfg, jax.devices()[:1], dtype=dtype, storage=storage, mtp=False, context=2).require_fits()
    return select_kernels(cfg, storage, kernels, dtype)


def active_weight_bytes(cfg: Config, params: Any, rows: int = 1) -> int:
    """Bytes of weights that the products of one token in each row read, as they are stored.

    Of the experts those that are chosen: by one token so many, by several as many as uniform routing would choose.
    """
    chosen = expected_active_experts(cfg, rows) / cfg.n_routed_experts

    def read(path: tuple[str, ...], weight: Any) -> float:
        if path[0] == "mtp" or (path[0] == "embed" and not cfg.tie_word_embeddings):
            return 0 if path[0] == "mtp" else rows * weight.nbytes / cfg.vocab_size
        is_expert = path[-2:-1] == ("moe",) and path[-1] in ("gate", "up", "down")
        return weight.nbytes * (chosen if is_expert else 1)

    return round(sum(read(path, weight) for path, weight in leaves_with_path(params)))
