"""The loss, computed with GLM's own forward pass; hooks read the load of every router."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm_jax.config import Config
from glm_jax.model import GLM, mtp
from glm_jax.model.block import ForwardContext
from glm_jax.model.hooks import ActivationHooks
from glm_jax.ops.linear import linear
from glm_jax.sharding import Rules

Tree = dict[str, Any]
MTP_ROUTER = "mtp.moe.router"


class ForwardOutputs(NamedTuple):
    """Outputs of a forward pass.

    Attributes:
        logits: Logits ``float32 [B, T, V]`` of the next token.
        draft: Logits ``float32 [B, T, V]`` of the token after next, by the prediction layer; None without it.
        loads: Tokens per expert ``float32 [l, E]`` by path of the layer group ("runs/1") or "mtp".
    """

    logits: jax.Array
    draft: jax.Array | None
    loads: dict[str, jax.Array]


class Losses(NamedTuple):
    """Sums over a batch, as scalars.

    Attributes:
        main: Weighted cross-entropies of the next token, in nats.
        draft: Weighted cross-entropies of the token after next, in nats.
        weight: Weights of the targets of ``main``.
        draft_weight: Weights of the targets of ``draft``.
        loads: Tokens per expert ``float32 [l, E]`` by path of the layer group ("runs/1") or "mtp".
    """

    main: jax.Array
    draft: jax.Array
    weight: jax.Array
    draft_weight: jax.Array
    loads: dict[str, jax.Array]


def forward(cfg: Config, params: Tree, tokens: jax.Array, *, with_mtp: bool) -> ForwardOutputs:
    """Runs the model over tokens ``int32 [B, T + 1]``; the last one is an input of the prediction layer only."""
    routers = {i: f"block.{i}.moe.router" for i, kind in enumerate(cfg.mlp_layer_types) if kind == "sparse"}
    current, following = tokens[:, :-1], tokens[:, 1:]
    names = (*routers.values(), "norm")
    logits, _, trace = GLM(cfg).apply({"params": params}, current, trace=names, attention="expanded")  # pyright: ignore[reportAssignmentType]
    loads = {
        f"runs/{g}": jnp.stack([_expert_load(trace[routers[group.start + i]]) for i in range(group.count)])
        for g, group in enumerate(cfg.layer_groups)
        if group.kind == "sparse"
    }
    if not with_mtp:
        return ForwardOutputs(logits, None, loads)
    draft, loads["mtp"] = _draft(cfg, params, trace["norm"], following)
    return ForwardOutputs(logits, draft, loads)


def _draft(cfg: Config, params: Tree, hidden: jax.Array, following: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The same as GLM.draft, which does not record its router.
    positions = jnp.broadcast_to(jnp.arange(following.shape[1], dtype=jnp.int32)[None], following.shape)
    ctx = ForwardContext(cfg, Rules(), positions, "expanded", ActivationHooks(frozenset({MTP_ROUTER}), {}))
    state, _ = mtp.draft_hidden_states(ctx, hidden, following, None, params["mtp"], params["embed"])
    logits = linear(state, params["head"], dtype=jnp.dtype(jnp.float32))
    return logits, _expert_load(ctx.hooks.recorded[MTP_ROUTER])[None]


def _expert_load(weights: jax.Array) -> jax.Array:
    return jnp.sum(weights > 0, axis=(0, 1)).astype(jnp.float32)


def compute_losses(cfg: Config, params: Tree, tokens: jax.Array, weights: jax.Array, *, with_mtp: bool) -> Losses:
    """Computes the losses of tokens ``int32 [B, T + 2]`` with target weights ``float32 [B, T + 2]``."""
    out = forward(cfg, params, tokens[:, :-1], with_mtp=with_mtp)
    main, weight = _cross_entropy(out.logits, tokens[:, 1:-1], weights[:, 1:-1])
    if out.draft is None:
        return Losses(main, jnp.float32(0), weight, jnp.float32(1), out.loads)
    draft, draft_weight = _cross_entropy(out.draft, tokens[:, 2:], weights[:, 2:])
    return Losses(main, draft, weight, draft_weight, out.loads)


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nats * weights), jnp.sum(weights)
