"""The loss: GLM's own forward pass, with the load of every router read on the way."""

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
    """Logits float32 [B, T, V] of the next token and of the one after it (if asked for); loads [l, E] by block."""

    logits: jax.Array
    draft: jax.Array | None
    loads: dict[str, jax.Array]


class Losses(NamedTuple):
    """Weighted sums of cross-entropies (nats) and the weights; loads float32 [l, E] by block."""

    main: jax.Array
    draft: jax.Array
    weight: jax.Array
    draft_weight: jax.Array
    loads: dict[str, jax.Array]


def forward(cfg: Config, params: Tree, tokens: jax.Array, *, with_mtp: bool) -> ForwardOutputs:
    """Runs the model over ``tokens`` int32 [B, T+1]; the last one serves the prediction layer only."""
    routers = {i: f"block.{i}.moe.router" for i, kind in enumerate(cfg.mlp_layer_types) if kind == "sparse"}
    here, after = tokens[:, :-1], tokens[:, 1:]
    logits, _, seen = GLM(cfg).apply({"params": params}, here, trace=(*routers.values(), "norm"), attention="expanded")  # pyright: ignore[reportAssignmentType]
    loads = {
        f"runs/{r}": jnp.stack([_expert_load(seen[routers[i]]) for i in range(run.start, run.start + run.count)])
        for r, run in enumerate(cfg.layer_groups)
        if run.kind == "sparse"
    }
    if not with_mtp:
        return ForwardOutputs(logits, None, loads)
    draft, loads["mtp"] = _draft(cfg, params, seen["norm"], after)
    return ForwardOutputs(logits, draft, loads)


def _draft(cfg: Config, params: Tree, hidden: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
    # GLM.draft does the same, but keeps no record of its router.
    positions = jnp.broadcast_to(jnp.arange(after.shape[1], dtype=jnp.int32)[None], after.shape)
    ctx = ForwardContext(cfg, Rules(), positions, "expanded", ActivationHooks(frozenset({MTP_ROUTER}), {}))
    state, _ = mtp.draft_hidden_states(ctx, hidden, after, None, params["mtp"], params["embed"])
    logits = linear(state, params["head"], dtype=jnp.dtype(jnp.float32))
    return logits, _expert_load(ctx.hooks.recorded[MTP_ROUTER])[None]


def _expert_load(weights: jax.Array) -> jax.Array:
    return jnp.sum(weights > 0, axis=(0, 1)).astype(jnp.float32)


def compute_losses(cfg: Config, params: Tree, tokens: jax.Array, weights: jax.Array, *, with_mtp: bool) -> Losses:
    """Sums over one group of rows, ``tokens`` int32 and ``weights`` float32 [B, T+2]."""
    out = forward(cfg, params, tokens[:, :-1], with_mtp=with_mtp)
    main, weight = _cross_entropy(out.logits, tokens[:, 1:-1], weights[:, 1:-1])
    if out.draft is None:
        return Losses(main, jnp.float32(0), weight, jnp.float32(1), out.loads)
    draft, draft_weight = _cross_entropy(out.draft, tokens[:, 2:], weights[:, 2:])
    return Losses(main, draft, weight, draft_weight, out.loads)


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(each * weights), jnp.sum(weights)
