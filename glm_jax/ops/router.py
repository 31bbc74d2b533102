"""The router of a mixture of experts: which experts each token uses, and their weights.

Routing is that of DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 2.1.2): sigmoid scores, a bias that takes part
in the choice only, the chosen scores normalized to sum to ``routed_scaling_factor``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.config import Config


class Routing(NamedTuple):
    """Experts of each token: ``expert_ids`` int32 ``[n, X]`` and their ``weights`` float32 ``[n, X]``."""

    expert_ids: jax.Array
    weights: jax.Array


def route(cfg: Config, x: jax.Array, router: jax.Array, bias: jax.Array) -> Routing:
    """Chooses ``num_experts_per_tok`` experts per token, in float32 at full matmul precision.

    Args:
        x: normed input ``[n, D]``.
        router: ``[E, D]``; ``bias``: float32 ``[E]``, decides only who is chosen.
    """
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    _, experts = jax.lax.top_k(_limit_groups(cfg, scores + bias[None]), cfg.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if cfg.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * cfg.routed_scaling_factor)


def _limit_groups(cfg: Config, choice: jax.Array) -> jax.Array:
    """Keeps the ``topk_group`` groups of experts with the highest sum of their two best; the rest can not be chosen."""
    if cfg.n_group == 1:
        return choice
    grouped = choice.reshape(choice.shape[0], cfg.n_group, -1)
    strength = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, kept = jax.lax.top_k(strength, cfg.topk_group)
    mask = jnp.any(jax.nn.one_hot(kept, cfg.n_group, dtype=jnp.bool_), axis=1)
    return jnp.where(mask[..., None], grouped, -jnp.inf).reshape(choice.shape)


def routing_to_dense(routing: Routing, num_experts: int) -> jax.Array:
    """The weights as ``[n, E]``, zero for experts that were not chosen."""
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32)
    return jnp.einsum("nxe,nx->ne", chosen, routing.weights, precision=jax.lax.Precision.HIGHEST)


def routing_from_dense(weights: jax.Array) -> Routing:
    """The routing with any weights ``[n, E]``: every expert is applied, since any number may have been given one."""
    return Routing(jnp.broadcast_to(jnp.arange(weights.shape[1], dtype=jnp.int32)[None], weights.shape), weights)
