"""The other side: transformers on torch, the same weights, as it comes."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.bench.backend import LoadStats
from glm_jax.bench.hardware import PeakMemoryMonitor
from glm_jax.errors import GlmError
from pallas_kernels.machine_info import num_cpu_cores


class TransformersBackend:
    """``AutoModelForCausalLM`` with its key-value cache, sdpa attention and its default experts.

    On the GPU where JAX is on one.
    """

    name = "transformers"

    def __init__(self, source: str, dtype: str) -> None:
        self.require(source)
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(num_cpu_cores())
        self._torch, self._transformers = torch, transformers
        self._device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        if self._device == "cuda" and not torch.cuda.is_available():
            raise GlmError("JAX runs on a GPU, and torch has none: install torch for CUDA, or run without its peer")
        started = time.perf_counter()
        with PeakMemoryMonitor() as memory:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(_hf_folder(source), dtype=getattr(torch, dtype), attn_implementation="sdpa")
            self._model: Any = model.to(self._device).eval()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.loaded = LoadStats(seconds=time.perf_counter() - started, weight_bytes=size, peak_bytes=memory.peak)
        self.compile_seconds = 0.0
        self._warm_shapes: set[Any] = set()

    @staticmethod
    def require(source: str) -> None:
        """Raises :class:`~glm_jax.errors.GlmError` if this side cannot run here, or not on this source."""
        _hf_folder(source)
        if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            raise GlmError(
                "--peer transformers needs torch and transformers: pip install 'glm-jax[parity]', or run without"
            )

    def prefill(self, prompts: np.ndarray) -> tuple[float, Any]:
        """As :meth:`glm_jax.bench.backend.Side.prefill`."""
        if prompts.shape not in self._warm_shapes:
            self._forward(self._to_tensor(prompts), self._new_cache())
            self._warm_shapes.add(prompts.shape)
        ids, cache = self._to_tensor(prompts), self._new_cache()
        started = time.perf_counter()
        following = self._forward(ids, cache)[:, 0].cpu()  # waits for the device
        return time.perf_counter() - started, following.numpy()

    def start(self, prompts: np.ndarray, tokens: int) -> tuple[Any, Any, int]:
        """As :meth:`glm_jax.bench.backend.Side.start`."""
        cache = self._new_cache()
        following = self._forward(self._to_tensor(prompts), cache)
        self._forward(following, cache)  # warm
        return cache, following, prompts.shape[1]

    def decode(self, state: tuple[Any, Any, int], tokens: int) -> tuple[float, np.ndarray]:
        """As :meth:`glm_jax.bench.backend.Side.decode`."""
        cache, following, length = state
        cache.crop(length - cache.get_seq_length())  # a negative number: that many tokens go
        written = []
        started = time.perf_counter()
        for _ in range(tokens):
            following = self._forward(following, cache)
            written.append(following)
        tokens_of_all = self._torch.cat(written, dim=1).cpu()  # waits for the device
        return time.perf_counter() - started, tokens_of_all.numpy()

    def _forward(self, ids: Any, cache: Any) -> Any:
        """The most likely next token of each row, ``[B, 1]``; only the last position's logits are computed."""
        with self._torch.inference_mode():
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1:].argmax(-1)

    def _new_cache(self) -> Any:
        return self._transformers.DynamicCache(config=self._model.config)

    def _to_tensor(self, prompts: np.ndarray) -> Any:
        return self._torch.from_numpy(prompts.astype(np.int64)).to(self._device)


def _hf_folder(source: str) -> str:
    """The Hugging Face folder (or hub id) of a source, which transformers can read as well."""
    if source == "tiny":
        return str(Path(__file__).resolve().parents[1] / "tiny")
    if source.startswith("synthetic:"):
        raise GlmError(
            f"transformers cannot read {source!r}; write it first: "
            f'python -m convert "{source}" FOLDER --to safetensors --dtype float32'
        )
    return source
