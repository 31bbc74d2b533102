"""Options of ``python -m glm_jax.plan``."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass
class PlanOptions:
    """Options of the command."""

    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=4"."""
    gpu: str | None = None
    """GPU to plan for, or several: h100, b200x4. Without it, the local device."""
    mesh: int | None = None
    """Number of local devices to split the model over."""
    quantize: str | None = None
    """Plan quantized weights: int4, int4-small, int4-experts or int8."""
    context: int | None = None
    """Tokens per sequence, prompt and completion together. Without it, the longest that fits."""
    sequences: int = 1
    """Number of concurrent sequences. A batch is padded to a power of two: give that number."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights that are not quantized."""
    cache_dtype: Literal["bfloat16", "float32", "int8", "fp8"] | None = None
    """Dtype of the latent cache. Without it, that of the weights."""
    mtp: bool = True
    """Count the multi-token-prediction layer, which is loaded with the model."""
    memory_fraction: float = 0.95
    """Fraction of a GPU's memory that JAX may use."""
    compile: bool = False
    """Also compile the decode loop for the GPU of --gpu, which need not be present, and show its kernels per token,
    CUDA graphs and memory. Takes a minute, and needs the packages of glm-jax[aot]."""
    json: bool = False
    """Print one JSON object instead of tables."""
