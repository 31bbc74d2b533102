"""Whether a model is run by hand-written kernels: what was asked for, and what its shapes and storage allow."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import pallas_kernels
from glm_jax.config import Config
from glm_jax.errors import GlmError
from glm_jax.model.fused_decode import unsupported_reason
from glm_jax.sharding import Rules
from glm_jax.weights.storage import Storage, abstract_params
from glm_jax.weights.tiling import ModelSharding, tile_params

KERNEL_CHOICES = ("triton", "reference")


def prefer_kernels(kernels: str | None, dtype: str) -> bool:
    """Whether to run a model by kernels: those for GPUs, on a GPU, in bfloat16, unless something else is asked for.

    Args:
        kernels: "triton", "reference", or None for whatever is best.
        dtype: of the activations.

    Raises:
        GlmError: for another word, or where there is no GPU or no Triton for kernels that are asked for.
    """
    if kernels is None:
        return pallas_kernels.kernels_available() and not pallas_kernels.is_interpreted() and dtype == "bfloat16"
    if kernels not in KERNEL_CHOICES:
        raise GlmError(f"kernels must be {' or '.join(map(repr, KERNEL_CHOICES))}, not {kernels!r}")
    if kernels == "triton" and not pallas_kernels.kernels_available():
        raise GlmError("kernels='triton' needs an NVIDIA GPU and the package triton (pip install 'glm-jax[cuda]')")
    return kernels == "triton"


def select_kernels(
    cfg: Config,
    storage: Storage,
    kernels: str | None,
    dtype: str,
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
) -> bool:
    """The same for a model, known from the shapes of its weights before any of them is read.

    Where kernels would be best and cannot run the model, a note on stderr says why.

    Args:
        cfg: the model.
        storage: of its quantized weights.
        kernels: as for :func:`prefer_kernels`.
        dtype: of the activations and of weights that are not quantized.
        rules: mesh axis of each logical axis.
        mesh: the devices, if several.

    Raises:
        GlmError: as :func:`prefer_kernels`, and where kernels that are asked for cannot run the model.
    """
    if not prefer_kernels(kernels, dtype):
        return False
    placement = None if mesh is None else ModelSharding(cfg, rules, mesh)
    params = abstract_params(cfg, jnp.dtype(dtype), storage=storage)
    problem = unsupported_reason(
        cfg, jax.eval_shape(functools.partial(tile_params, placement=placement), params), rules
    )
    if problem is None:
        return True
    if kernels is not None:
        raise GlmError(f"the kernels cannot run this model: {problem}; use kernels='reference'")
    print(f"note: this model runs without hand-written kernels: {problem}", file=sys.stderr)
    return False
