"""One transformer block, and the prediction layer, as functions of their weights and inputs."""

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

Weights = Mapping[ParamPath, jax.Array]  # by path within the layer, without a layer axis


@dataclasses.dataclass(frozen=True, slots=True)
class BlockForward:
    """One layer, from float32 ``[B, T, D]`` to float32 ``[B, T, D]``.

    Attributes:
        cfg: Config of the model.
    """

    cfg: Config

    def __call__(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Returns the residual stream after the layer."""
        return _block(self.cfg, weights, x, ActivationHooks())

    def count_expert_tokens(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Returns the number of tokens that are routed to each expert, int32 ``[E]``."""
        hooks = ActivationHooks(trace=frozenset(["layer.moe.router"]))
        _block(self.cfg, weights, x, hooks)
        return jnp.sum(hooks.recorded["layer.moe.router"] > 0, axis=(0, 1)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class MtpForward:
    """The prediction layer, from ``[next token's embedding | state]`` float32 ``[B, T, 2 D]`` to ``[B, T, D]``.

    Attributes:
        cfg: Config of the model.
    """

    cfg: Config

    def __call__(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Returns the state before ``shared_head.norm``."""
        return _block(self.cfg, weights, self._project_inputs(weights, x), ActivationHooks())

    def count_expert_tokens(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Returns the number of tokens that are routed to each expert, int32 ``[E]``."""
        return BlockForward(self.cfg).count_expert_tokens(weights, self._project_inputs(weights, x))

    def _project_inputs(self, weights: Weights, x: jax.Array) -> jax.Array:
        eps = self.cfg.rms_norm_eps
        embedded, hidden = jnp.split(x, 2, axis=-1)
        normed = [rms_norm(embedded, weights["enorm",], eps), rms_norm(hidden, weights["hnorm",], eps)]
        return linear(jnp.concatenate(normed, axis=-1), weights["eh_proj",])


def _block(cfg: Config, weights: Weights, x: jax.Array, hooks: ActivationHooks) -> jax.Array:
    tree: dict[str, dict[str, Any]] = {}
    for path, value in weights.items():
        if len(path) == 2:
            tree.setdefault(path[0], {})[path[1]] = value[None]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    return transformer_block(ForwardContext(cfg, Rules(), positions, hooks=hooks), x, None, tree, 0, 0, "layer")[0]
