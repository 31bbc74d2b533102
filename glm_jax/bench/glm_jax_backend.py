"""glm-jax as a benchmark backend: the compiled steps that :class:`glm_jax.LLM` runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
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
from glm_jax.memory import active_weight_bytes, plan_memory_on_devices
from glm_jax.model.glm import GLM
from glm_jax.model.kernel_selection import select_kernels
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.weights import QuantRules
from glm_jax.weights.params import ParamTree
from glm_jax.weights.storage import Storage, plan_storage
from glm_jax.weights.tiling import has_tiled_weights
from pallas_kernels import random_arrays


@dataclasses.dataclass(slots=True)
class DecodeSnapshot:
    """State of a batch from which decoding can start again and again.

    The cache is not restored between runs. A run writes only slots to the right of the sequences' positions, and the
    next run overwrites them.

    Attributes:
        cache: Latent cache, which every run donates and returns.
        host_state: All other fields of :class:`~glm_jax.engine.steps.DecodeState`, on the host.
    """

    cache: LatentCache
    host_state: dict[str, Any]

    @classmethod
    def from_state(cls, state: DecodeState) -> DecodeSnapshot:
        """Returns a snapshot that takes over the cache of a state."""
        names = [field.name for field in dataclasses.fields(state) if field.name != "cache"]
        return cls(state.cache, {name: jax.device_get(getattr(state, name)) for name in names})

    def to_state(self) -> DecodeState:
        """Returns the state on the device."""
        return DecodeState(cache=self.cache, **jax.tree.map(jnp.asarray, self.host_state))


class GlmJaxBackend:
    """glm-jax on JAX's default device.

    Args:
        source: Model, as for :func:`glm_jax.checkpoint.open_source`.
        dtype: Dtype of the activations and of the weights that are not quantized.
        quantize: Quantization preset.
        cache_dtype: Dtype of the latent cache; that of the activations by default.
        kernels: "triton", "reference", or ``None`` for the choice of :meth:`glm_jax.LLM.load`.
        name: Name in reports.

    Attributes:
        cfg: Config of the model.
        params: Parameters.
        storage: Storage of the quantized parameters.
        use_kernels: Whether the hand-written kernels run.

    Raises:
        GlmError: if the requested kernels cannot run the model.
        MemoryPlanError: if its weights do not fit.
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
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.load_stats = LoadStats(seconds=time.perf_counter() - started, weight_bytes=nbytes, peak_bytes=memory.peak)
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
        self._compiled_shapes: set[Hashable] = set()

    def prefill(self, prompts: np.ndarray) -> tuple[float, np.ndarray]:
        """Implements :meth:`glm_jax.bench.backend.BenchBackend.prefill`."""
        token_ids = prompts.tolist()
        self._warm_up(("prefill", prompts.shape), lambda: self._runner.prefill(token_ids, prompts.shape[1]))
        started = time.perf_counter()
        _, logits, _ = jax.block_until_ready(self._runner.prefill(token_ids, prompts.shape[1]))
        seconds = time.perf_counter() - started
        return seconds, np.asarray(jnp.argmax(logits[: len(token_ids)], axis=-1))

    def start(self, prompts: np.ndarray, tokens: int) -> DecodeSnapshot:
        """Implements :meth:`glm_jax.bench.backend.BenchBackend.start`."""
        num_prompts, length = prompts.shape
        cache, logits, lengths = self._runner.prefill(prompts.tolist(), length + tokens + 1)
        batch = len(lengths)  # padded to a power of two
        remaining = np.full(batch, tokens + 1, np.int32)
        is_padding = np.arange(batch) >= num_prompts
        state, _ = start_decode(cache, logits, lengths, remaining, is_padding, self._greedy_sampler(batch))
        return DecodeSnapshot.from_state(state)

    def start_with_random_cache(self, num_sequences: int, context: int, tokens: int) -> DecodeSnapshot:
        """Returns a state as after prompts of ``context`` tokens, but with random values in the cache.

        The values depend only on the shape, so all backends get the same.
        """
        batch = bucket_size(num_sequences)
        shape = (self.cfg.num_hidden_layers, batch, cache_capacity(context, tokens), self.cfg.cache_width)
        kind = self.cache_dtype
        values, scales = jax.jit(lambda: random_arrays.random_cache_rows(shape, kind, context))()
        dequant_dtype = default_cache_dtype(None, self.params["embed"].dtype) if kind in QUANTIZED_CACHE_MAX else None
        first = np.random.default_rng(context).integers(0, self.cfg.vocab_size, batch, np.int32)
        state = DecodeState(
            cache=LatentCache(values, scales, dequant_dtype),
            tokens=jnp.asarray(first),
            positions=jnp.full(batch, context, jnp.int32),
            remaining=jnp.full(batch, tokens + 1, jnp.int32),
            done=jnp.arange(batch, dtype=jnp.int32) >= num_sequences,
            finite=jnp.ones(batch, bool),
            sampler=self._greedy_sampler(batch),
        )
        return DecodeSnapshot.from_state(state)

    def decode(self, state: DecodeSnapshot, tokens: int) -> tuple[float, np.ndarray]:
        """Implements :meth:`glm_jax.bench.backend.BenchBackend.decode`."""
        self._warm_up(("decode", state.cache.data.shape), lambda: self._run_decode_steps(state, state.to_state(), 1))
        decode_state = jax.block_until_ready(state.to_state())
        started = time.perf_counter()
        generated = self._run_decode_steps(state, decode_state, tokens)
        return time.perf_counter() - started, generated

    def compile_stats(self, state: DecodeSnapshot) -> dict[str, Any]:
        """Compiles the decode loop for the local device and returns facts about it.

        See :func:`glm_jax.engine.aot.compile_decode_loop`.
        """
        sharding = SingleDeviceSharding(jax.devices()[0])
        return aot.compile_decode_loop(GLM(self.cfg), self.params, state.to_state(), sharding)

    def bytes_per_step(self, sequences: int, context: int) -> int:
        """Returns the bytes read to decode one token of each of ``sequences`` sequences after ``context`` tokens."""
        cached = sequences * context * bytes_per_token(self.cfg, self.cache_dtype)
        return active_weight_bytes(self.cfg, self.params, sequences) + cached

    def _greedy_sampler(self, batch: int) -> SamplerState:
        return SamplerState.create(
            [SamplingParams(temperature=0.0, ignore_eos=True)] * batch,
            [0] * batch,
            [(0,)] * batch,  # prompts matter only to penalties
            vocab_size=self.cfg.vocab_size,
            valid_vocab=self.cfg.vocab_size,
            eos_ids=self.cfg.eos_token_ids,
        )

    def _run_decode_steps(self, snapshot: DecodeSnapshot, state: DecodeState, tokens: int) -> np.ndarray:
        """Runs ``tokens`` steps and returns their tokens ``int32 [B, tokens]``; the snapshot gets the cache back."""
        generated = []
        for num_done in range(0, tokens, MAX_DECODE_STEPS):
            limit = np.int32(min(MAX_DECODE_STEPS, tokens - num_done))
            state, output = decode_steps(self._runner.model, self.params, state, limit, steps=MAX_DECODE_STEPS)
            snapshot.cache = state.cache
            generated.append(np.asarray(output.tokens)[:, :limit])
        return np.concatenate(generated, axis=1)

    def _warm_up(self, key: Hashable, call: Callable[[], object]) -> None:
        """Compiles with an untimed first call unless this shape has been called before."""
        if key in self._compiled_shapes:
            return
        started = time.perf_counter()
        jax.block_until_ready(call())
        self.compile_seconds += time.perf_counter() - started
        self._compiled_shapes.add(key)


def cache_capacity(context: int, tokens: int) -> int:
    """Returns the slots of a cache for a context and the tokens generated after it, a multiple of 128."""
    return -(-(context + tokens + 1) // 128) * 128


def _load(source: str, dtype: str, quantize: str | None, kernels: str | None) -> tuple[Config, ParamTree, Storage]:
    """Loads a model without its prediction layer, which no peer loads."""
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
    """Returns whether kernels run the model; raises if it does not fit, before any weight is read or generated."""
    plan_memory_on_devices(cfg, jax.devices()[:1], dtype=dtype, storage=storage, mtp=False, context=2).require_fits()
    return select_kernels(cfg, storage, kernels, dtype)
