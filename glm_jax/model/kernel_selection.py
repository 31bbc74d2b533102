"""Whether hand-written kernels or the reference run a model: from the request, the device, shapes and storage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glm_jax.config import Config
from glm_jax.errors import GlmError
from glm_jax.sharding import Rules
from glm_jax.weights import as_weight_matrix
from glm_jax.weights.params import ParamTree, leaves_with_path
from glm_jax.weights.storage import Storage, abstract_params
from glm_jax.weights.tiling import ModelSharding, is_tiled_path, tile_params
from pallas_kernels import is_interpreted, kernels_available
from pallas_kernels.tiles import has_same_layout

_LOGGER = logging.getLogger(__name__)
KERNEL_CHOICES = ("triton", "reference")
COLUMN_BLOCK = 64  # the widths of heads and latents are multiples of it
_UNSPLIT_AXES = ("batch", "seq", "embed", "latent", "experts")  # logical axes that kernels cannot split over devices


def prefer_kernels(kernels: str | None, dtype: str) -> bool:
    """Whether kernels should run a model: by default in bfloat16 on a GPU that has them.

    Args:
        kernels: "triton", "reference", or None for the default.
        dtype: Dtype of the activations.

    Raises:
        GlmError: For another choice, or for "triton" without a GPU or without the package triton.
    """
    if kernels is None:
        return kernels_available() and not is_interpreted() and dtype == "bfloat16"
    if kernels not in KERNEL_CHOICES:
        raise GlmError(f"kernels must be {' or '.join(map(repr, KERNEL_CHOICES))}, not {kernels!r}")
    if kernels == "triton" and not kernels_available():
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
    """Decides once per model whether kernels or the reference run it, before any weight is read.

    The decision reaches the operations through the weights: kernels run where matrices are loaded in tiles. A note on
    stderr says why a model falls back to the reference where kernels are the default.

    Args:
        cfg: Config of the model.
        storage: Its quantized weights.
        kernels: Request, as for :func:`prefer_kernels`.
        dtype: Dtype of the activations and of weights that are not quantized.
        rules: Mesh axis of each logical axis.
        mesh: The devices, if there are several.

    Raises:
        GlmError: As :func:`prefer_kernels`, and where "triton" cannot run the model.
    """
    if not prefer_kernels(kernels, dtype):
        return False
    placement = None if mesh is None else ModelSharding(cfg, rules, mesh)
    params = abstract_params(cfg, jnp.dtype(dtype), storage=storage)
    tiled = jax.eval_shape(functools.partial(tile_params, placement=placement), params)
    reason = unsupported_reason(cfg, tiled, rules)
    if reason is None:
        return True
    if kernels is not None:
        raise GlmError(f"the kernels cannot run this model: {reason}; use kernels='reference'")
    _LOGGER.warning("note: this model runs without hand-written kernels: %s", reason)
    return False


def unsupported_reason(cfg: Config, body: Mapping[str, Any], rules: Rules = Rules()) -> str | None:
    """Why the fused decode kernels cannot run a model; None if they can.

    Args:
        cfg: Config of the model.
        body: ``embed`` and ``runs`` of its parameters, arrays or shapes.
        rules: Mesh axis of each logical axis.
    """
    if not kernels_available():
        return "there is no GPU, or no Triton"
    if split := [axis for axis in _UNSPLIT_AXES if getattr(rules, axis)]:
        return f"they run on devices that split heads, widths and vocabulary, not {split[0]}"
    if reason := _unsupported_config(cfg):
        return reason
    if untiled := _untiled_paths(body["runs"]):
        return f"the storage of {untiled[0]} has no layout in tiles"
    if not is_interpreted() and body["embed"].dtype != jnp.bfloat16:
        return f"they compute in bfloat16, not in {jnp.dtype(body['embed'].dtype).name}"
    return next((reason for group in body["runs"].values() if (reason := _mismatched_storage(group))), None)


def _unsupported_config(cfg: Config) -> str | None:
    if cfg.q_lora_rank is None:
        return "its queries have no latent"
    if cfg.n_group != 1:
        return "its experts are chosen by group"
    if any(width & (width - 1) for width in (cfg.kv_lora_rank, cfg.qk_rope_head_dim)):
        return "the widths of latent and rope key must be powers of two"
    if cfg.qk_head_dim % COLUMN_BLOCK or cfg.q_lora_rank % COLUMN_BLOCK or cfg.kv_lora_rank % COLUMN_BLOCK:
        return f"the widths of head and latents must be multiples of {COLUMN_BLOCK}"
    return None


def _untiled_paths(groups: ParamTree) -> list[str]:
    """Matrices that kernels would read in tiles and that are stored otherwise."""
    paths = [(("runs", *path), leaf) for path, leaf in leaves_with_path(groups)]
    return ["/".join(path) for path, leaf in paths if is_tiled_path(path) and not as_weight_matrix(leaf).is_tiled]


def _mismatched_storage(group: ParamTree) -> str | None:
    """Weights of a layer group that one kernel reads together but that are stored in different ways."""
    attn, feed_forward = group["attn"], group.get("moe") or group["mlp"]
    if attn["q_a"].tiles.kind != attn["kv_a"].tiles.kind:
        return "q_a and kv_a are stored in different ways"
    for one, other in (("gate", "up"), ("shared_gate", "shared_up")):
        if one in feed_forward and not has_same_layout(feed_forward[one].tiles, feed_forward[other].tiles):
            return f"{one} and {other} are stored in different ways"
    return None
