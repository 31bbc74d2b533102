"""The router of a mixture of experts: which experts each token uses, and their weights.

Routing is that of DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 2.1.2): sigmoid scores, a bias that only
affects which experts are chosen, and scores of the chosen experts normalized to sum to ``routed_scaling_factor``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.config import Config


class Routing(NamedTuple):
    """Chosen experts of each token.

    Attributes:
        expert_ids: ``int32 [n, X]``.
        weights: ``float32 [n, X]``.
    """

    expert_ids: jax.Array
    weights: jax.Array


@jax.named_scope("router")
def route(cfg: Config, x: jax.Array, router: jax.Array, bias: jax.Array) -> Routing:
    """Chooses ``num_experts_per_tok`` experts per token, in float32 at full matmul precision.

    Args:
        cfg: Config of the model.
        x: Normed input ``[n, D]``.
        router: ``[E, D]``.
        bias: ``float32 [E]``, added to the scores for the choice only.
    """
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    _, experts = jax.lax.top_k(_mask_groups(cfg, scores + bias[None]), cfg.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if cfg.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * cfg.routed_scaling_factor)


def _mask_groups(cfg: Config, scores: jax.Array) -> jax.Array:
    """Masks all but the ``topk_group`` groups of experts with the highest sum of their two best scores."""
    if cfg.n_group == 1:
        return scores
    grouped = scores.reshape(scores.shape[0], cfg.n_group, -1)
    strength = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, kept = jax.lax.top_k(strength, cfg.topk_group)
    mask = jnp.any(jax.nn.one_hot(kept, cfg.n_group, dtype=jnp.bool_), axis=1)
    return jnp.where(mask[..., None], grouped, -jnp.inf).reshape(scores.shape)


def routing_to_dense(routing: Routing, num_experts: int) -> jax.Array:
    """The weights as ``float32 [n, E]``, zero for experts that were not chosen."""
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32)
    return jnp.einsum("nxe,nx->ne", chosen, routing.weights, precision=jax.lax.Precision.HIGHEST)


def routing_from_dense(weights: jax.Array) -> Routing:
    """A routing that applies every expert, with weights ``float32 [n, E]`` of which any may be nonzero."""
    return Routing(jnp.broadcast_to(jnp.arange(weights.shape[1], dtype=jnp.int32)[None], weights.shape), weights)
