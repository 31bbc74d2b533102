"""transformers on torch as a benchmark backend: the same weights, in its default configuration."""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glm_jax.bench.backend import LoadStats
from glm_jax.bench.hardware import PeakMemoryMonitor
from glm_jax.checkpoint.sources.open import TINY_MODEL, tiny_folder
from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX
from glm_jax.errors import GlmError
from pallas_kernels.machine_info import num_cpu_cores

if TYPE_CHECKING:
    from torch import Tensor  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

_TransformersStart = tuple["DynamicCache", "Tensor", int]  # cache, next token of each prompt, prompt length


class TransformersBackend:
    """``AutoModelForCausalLM`` with its key-value cache, sdpa attention and default experts, on JAX's kind of device.

    Args:
        source: Model, as for :func:`glm_jax.checkpoint.open_source`; transformers cannot read all of them.
        dtype: Dtype of weights and activations.

    Raises:
        GlmError: if torch cannot run here, or cannot read the source.
    """

    name = "transformers"

    def __init__(self, source: str, dtype: str) -> None:
        self.require(source)
        import torch  # pyright: ignore[reportMissingImports]  # optional extra
        import transformers  # pyright: ignore[reportMissingImports]  # optional extra

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(num_cpu_cores())
        self._torch, self._transformers = torch, transformers
        self._device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        if self._device == "cuda" and not torch.cuda.is_available():
            raise GlmError("JAX runs on a GPU, and torch has none: install torch for CUDA, or run without this peer")
        started = time.perf_counter()
        with PeakMemoryMonitor() as memory:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(_hf_folder(source), dtype=getattr(torch, dtype), attn_implementation="sdpa")
            self._model: Any = model.to(self._device).eval()
        nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.load_stats = LoadStats(seconds=time.perf_counter() - started, weight_bytes=nbytes, peak_bytes=memory.peak)
        self.compile_seconds = 0.0
        self._warm_shapes: set[tuple[int, ...]] = set()

    @staticmethod
    def require(source: str) -> None:
        """Checks that torch and transformers are installed and can read the source.

        Raises:
            GlmError: if not.
        """
        _hf_folder(source)
        if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            raise GlmError(
                "--peer transformers needs torch and transformers: pip install 'glm-jax[parity]', or run without"
            )

    def prefill(self, prompts: np.ndarray) -> tuple[float, np.ndarray]:
        """Implements :meth:`glm_jax.bench.backend.BenchBackend.prefill`."""
        if prompts.shape not in self._warm_shapes:
            self._forward(self._to_tensor(prompts), self._new_cache())
            self._warm_shapes.add(prompts.shape)
        ids, cache = self._to_tensor(prompts), self._new_cache()
        started = time.perf_counter()
        next_tokens = self._forward(ids, cache)[:, 0].cpu()  # waits for the device
        return time.perf_counter() - started, next_tokens.numpy()

    def start(self, prompts: np.ndarray, tokens: int) -> _TransformersStart:
        """Implements :meth:`glm_jax.bench.backend.BenchBackend.start`."""
        cache = self._new_cache()
        next_tokens = self._forward(self._to_tensor(prompts), cache)
        self._forward(next_tokens, cache)  # warms up the decode step
        return cache, next_tokens, prompts.shape[1]

    def decode(self, state: _TransformersStart, tokens: int) -> tuple[float, np.ndarray]:
        """Implements :meth:`glm_jax.bench.backend.BenchBackend.decode`."""
        cache, next_tokens, length = state
        cache.crop(length - cache.get_seq_length())  # a negative argument removes that many tokens
        generated = []
        started = time.perf_counter()
        for _ in range(tokens):
            next_tokens = self._forward(next_tokens, cache)
            generated.append(next_tokens)
        all_tokens = self._torch.cat(generated, dim=1).cpu()  # waits for the device
        return time.perf_counter() - started, all_tokens.numpy()

    def _forward(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Returns the most likely next tokens ``int64 [B, 1]``; computes the logits of the last position only."""
        with self._torch.inference_mode():
            output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1:].argmax(-1)

    def _new_cache(self) -> DynamicCache:
        return self._transformers.DynamicCache(config=self._model.config)

    def _to_tensor(self, prompts: np.ndarray) -> Tensor:
        return self._torch.from_numpy(prompts.astype(np.int64)).to(self._device)


def _hf_folder(source: str) -> str:
    """Returns the Hugging Face folder or hub id of a source, which transformers can read."""
    if source == TINY_MODEL:
        return str(tiny_folder())
    if source.startswith(SYNTHETIC_PREFIX):
        raise GlmError(
            f"transformers cannot read {source!r}; write it first: "
            f'python -m convert "{source}" FOLDER --to safetensors --dtype float32'
        )
    return source
