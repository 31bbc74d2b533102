"""A transformer block, and the prediction layer, as functions of their weights and their input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.config import Config
from glm_jax.model.block import Context, Taps, block
from glm_jax.ops.linear import linear
from glm_jax.ops.norm import rms_norm
from glm_jax.sharding import Rules
from glm_jax.weights.params import Path

Weights = Mapping[Path, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One layer: ``[B, T, D]`` to ``[B, T, D]``; weights by path, without a layer axis."""

    cfg: Config

    def __call__(self, weights: Weights, x: jax.Array) -> jax.Array:
        """The residual stream after the layer."""
        return _block(self.cfg, weights, x, Taps())

    def loads(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Tokens that each expert is given, int32 ``[E]``."""
        taps = Taps(trace=frozenset(["layer.moe.router"]))
        _block(self.cfg, weights, x, taps)
        return jnp.sum(taps.recorded["layer.moe.router"] > 0, axis=(0, 1)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction layer: ``[embedding of the next token | state]`` ``[B, T, 2 D]`` to ``[B, T, D]``."""

    cfg: Config

    def __call__(self, weights: Weights, x: jax.Array) -> jax.Array:
        """The state before ``shared_head.norm``."""
        return _block(self.cfg, weights, self._joined(weights, x), Taps())

    def loads(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Tokens that each expert is given, int32 ``[E]``."""
        return Block(self.cfg).loads(weights, self._joined(weights, x))

    def _joined(self, weights: Weights, x: jax.Array) -> jax.Array:
        eps = self.cfg.rms_norm_eps
        embedded, hidden = jnp.split(x, 2, axis=-1)
        normed = [rms_norm(embedded, weights["enorm",], eps), rms_norm(hidden, weights["hnorm",], eps)]
        return linear(jnp.concatenate(normed, axis=-1), weights["eh_proj",])


def _block(cfg: Config, weights: Weights, x: jax.Array, taps: Taps) -> jax.Array:
    tree: dict[str, dict[str, Any]] = {}
    for path, value in weights.items():
        if len(path) == 2:
            tree.setdefault(path[0], {})[path[1]] = value[None]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    return block(Context(cfg, Rules(), positions, taps=taps), x, None, tree, 0, 0, "layer")[0]
