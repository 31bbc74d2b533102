"""Options of the benchmark commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

Peer = Literal["transformers", "reference", "unquantized"]


@dataclasses.dataclass(kw_only=True)
class BenchOptions:
    """Options that decode and prefill share."""

    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=2&seed=0"."""
    batch: str = "1"
    """Batch sizes, one case each: "1,8"."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and activations, also of the peers. Without it, bfloat16 on a GPU and float32 on a CPU."""
    quantize: str | None = None
    """Quantize glm-jax's weights while loading: int4, int4-small, int4-experts or int8. A synthetic model gets random
    quantized weights."""
    cache_dtype: Literal["bfloat16", "float32", "int8", "fp8"] | None = None
    """Dtype of glm-jax's latent cache. Without it, that of the activations."""
    peer: tuple[Peer, ...] = ()
    """Also time a peer, alternating with glm-jax: "transformers" on the same weights, "reference" is glm-jax without
    hand-written kernels, "unquantized" is glm-jax without --quantize."""
    repeats: int = 5
    """Number of times that each model runs."""
    details: bool = True
    """On a GPU also count launches, and time each operation once with JAX's profiler."""
    memory_fraction: float = 0.95
    """Fraction of a GPU's memory that JAX may use."""
    json: Path | None = None
    """Write the report to this file after every case."""
    markdown: Path | None = None
    """Write the tables to this file after every case."""
    out: Path | None = None
    """Write both into this folder, named after device, kind, model and quantization."""


@dataclasses.dataclass(kw_only=True)
class DecodeOptions(BenchOptions):
    """Time greedy decoding after a context."""

    context: str = "128"
    """Tokens in the cache, one case each: "1k,8k,32k" (k is 1,024). The cache holds random values, unless a peer has to
    read a prompt."""
    tokens: int = 32
    """Number of tokens to generate."""


@dataclasses.dataclass(kw_only=True)
class PrefillOptions(BenchOptions):
    """Time the prefill of prompts into a new cache."""

    lengths: str = "128,512"
    """Prompt lengths, one case each: "1k,8k"."""


@dataclasses.dataclass(kw_only=True)
class ProjectOptions:
    """Project the speeds of a decode report onto other GPUs. Nothing is run."""

    report: Path
    """JSON of ``python -m glm_jax.bench decode`` with --batch 1 on a known GPU."""
    gpu: str = "rtx6000-ada,b200x4"
    """GPUs, or several of one kind: "h100,b200x4"."""
