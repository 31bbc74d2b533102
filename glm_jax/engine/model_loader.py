"""Loads a model for generation: source, assets, sharding, kernels, memory plan, then the weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm_jax import checkpoint
from glm_jax.cache.latent import canonical_cache_dtype
from glm_jax.checkpoint import SourceInfo
from glm_jax.config import Config
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.compile_cache import enable_compile_cache
from glm_jax.engine.runner import default_cache_dtype
from glm_jax.errors import GlmError, ShardingError
from glm_jax.memory import MemoryModel, format_bytes, plan_memory_on_devices
from glm_jax.model.kernel_selection import prefer_kernels, select_kernels
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from glm_jax.weights import QuantRules
from glm_jax.weights.params import ParamTree

_DTYPES = ("bfloat16", "float32")
_MIN_BYTES_WITH_PROGRESS = 1 << 30
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A loaded model and its plan.

    Attributes:
        cfg: Config of the model.
        params: Parameters, on their devices.
        assets: Tokenizer, chat template and generation defaults.
        info: Description of the source, which saving reuses.
        rules: Mesh axis of each logical axis.
        mesh: Devices of the parameters, or None for one device.
        cache_dtype: Dtype of the latent cache.
        max_model_len: Longest prompt and completion together, in tokens.
        memory_model: Memory model of the plan, which limits batches.
    """

    cfg: Config
    params: ParamTree
    assets: ModelAssets
    info: SourceInfo
    rules: Rules
    mesh: Mesh | None
    cache_dtype: str
    max_model_len: int
    memory_model: MemoryModel


def load_model(
    source: str | Path,
    *,
    quantize: str | QuantRules | None,
    dtype: str,
    cache_dtype: DTypeLike | None,
    mesh: int | Mesh | None,
    sharding: str | None,
    max_model_len: int | str,
    kernels: str | None,
    check: bool,
    progress: bool | None,
) -> LoadedModel:
    """Loads a model; arguments and errors are those of :meth:`glm_jax.LLM.load`.

    Everything that can fail without the weights fails before they are read.
    """
    enable_compile_cache()
    if dtype not in _DTYPES:
        raise GlmError(f"dtype must be {' or '.join(_DTYPES)}, not {dtype!r}")
    requested_cache_dtype = None if cache_dtype is None else canonical_cache_dtype(cache_dtype)
    weights = checkpoint.open_source(source, dtype=dtype)
    context = _check_max_model_len(weights.cfg, max_model_len)
    assets = ModelAssets.load(weights.cfg, weights.info.folder)
    rules, device_mesh = _resolve_sharding(mesh, sharding)
    prefer_kernels(kernels, dtype)  # raises where the requested kernels cannot run
    weights = checkpoint.quantize_source(weights, quantize, dtype, rules, device_mesh)
    storage = checkpoint.source_storage(weights)
    use_kernels = select_kernels(weights.cfg, storage, kernels, dtype, rules, device_mesh)
    chosen_cache_dtype = requested_cache_dtype or default_cache_dtype(device_mesh, dtype)
    plan = plan_memory_on_devices(
        weights.cfg,
        device_mesh or jax.devices()[:1],
        dtype=dtype,
        storage=storage,
        cache_dtype=chosen_cache_dtype,
        rules=rules,
        context=context,
    ).require_fits()
    nbytes = weights.total_bytes()
    for note in weights.info.notes:
        _LOGGER.warning("note: %s; %s of weights in all", note, format_bytes(nbytes))
    cfg, params, info = checkpoint.load(
        weights,
        dtype=dtype,
        rules=rules,
        mesh=device_mesh,
        tiles=use_kernels,
        check=check,
        progress=nbytes > _MIN_BYTES_WITH_PROGRESS if progress is None else progress,
    )
    return LoadedModel(
        cfg=cfg,
        params=params,
        assets=assets,
        info=info,
        rules=rules,
        mesh=device_mesh,
        cache_dtype=chosen_cache_dtype,
        max_model_len=context or plan.max_context,
        memory_model=plan.memory_model,
    )


def _resolve_sharding(mesh: int | Mesh | None, sharding: str | None) -> tuple[Rules, Mesh | None]:
    """Sharding rules and mesh; a model on one device is not split unless ``sharding`` says so."""
    device_mesh = None if mesh is None else make_mesh(mesh)
    rules = get_sharding_preset(sharding or ("replicated" if mesh in (None, 1) else "latency"))
    if device_mesh is None and rules.mesh_axes:
        raise ShardingError(f"sharding={sharding!r} needs devices to split over: give mesh=, the number of them")
    return rules, device_mesh


def _check_max_model_len(cfg: Config, max_model_len: int | str) -> int | None:
    """The requested context; None for "auto", the longest that fits."""
    if max_model_len == "auto":
        return None
    if not isinstance(max_model_len, int) or not 1 < max_model_len <= cfg.max_position_embeddings:
        raise GlmError(f'max_model_len must be "auto" or 2 to {cfg.max_position_embeddings:,}, not {max_model_len!r}')
    return max_model_len
