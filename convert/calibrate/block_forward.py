"""A transformer block, and the prediction layer, as functions of their weights and their input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.config import Config
from glm_jax.model.block import ForwardContext, transformer_block
from glm_jax.model.hooks import ActivationHooks
from glm_jax.ops.linear import linear
from glm_jax.ops.norm import rms_norm
from glm_jax.sharding import Rules
from glm_jax.weights.params import ParamPath

Weights = Mapping[ParamPath, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockForward:
    """One layer: ``[B, T, D]`` to ``[B, T, D]``; weights by path, without a layer axis."""

    cfg: Config

    def __call__(self, weights: Weights, x: jax.Array) -> jax.Array:
        """The residual stream after the layer."""
        return _block(self.cfg, weights, x, ActivationHooks())

    def count_expert_tokens(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Tokens that each expert is given, int32 ``[E]``."""
        taps = ActivationHooks(trace=frozenset(["layer.moe.router"]))
        _block(self.cfg, weights, x, taps)
        return jnp.sum(taps.recorded["layer.moe.router"] > 0, axis=(0, 1)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class MtpForward:
    """The prediction layer: ``[embedding of the next token | state]`` ``[B, T, 2 D]`` to ``[B, T, D]``."""

    cfg: Config

    def __call__(self, weights: Weights, x: jax.Array) -> jax.Array:
        """The state before ``shared_head.norm``."""
        return _block(self.cfg, weights, self._project_inputs(weights, x), ActivationHooks())

    def count_expert_tokens(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Tokens that each expert is given, int32 ``[E]``."""
        return BlockForward(self.cfg).count_expert_tokens(weights, self._project_inputs(weights, x))

    def _project_inputs(self, weights: Weights, x: jax.Array) -> jax.Array:
        eps = self.cfg.rms_norm_eps
        embedded, hidden = jnp.split(x, 2, axis=-1)
        normed = [rms_norm(embedded, weights["enorm",], eps), rms_norm(hidden, weights["hnorm",], eps)]
        return linear(jnp.concatenate(normed, axis=-1), weights["eh_proj",])


def _block(cfg: Config, weights: Weights, x: jax.Array, taps: ActivationHooks) -> jax.Array:
    tree: dict[str, dict[str, Any]] = {}
    for path, value in weights.items():
        if len(path) == 2:
            tree.setdefault(path[0], {})[path[1]] = value[None]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    return transformer_block(ForwardContext(cfg, Rules(), positions, hooks=taps), x, None, tree, 0, 0, "layer")[0]
