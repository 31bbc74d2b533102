"""One training step, a pure function of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from examples.tiny_recipe.batches import TokenBatch
from examples.tiny_recipe.loss import Losses, compute_losses
from examples.tiny_recipe.optimizer import make_optimizer, update_router_biases
from examples.tiny_recipe.schedule import TrainingSchedule
from glm_jax.config import Config
from glm_jax.weights.random_init import init_params

Tree = dict[str, Any]
Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", tuple[TokenBatch, TokenBatch], jax.Array, jax.Array], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """Parameters in float32, and the optimizer's state."""

    params: Tree
    optimizer: Any


def initial_state(cfg: Config, plan: TrainingSchedule) -> TrainState:
    """The state before the first step: random parameters from the schedule's seed."""
    params = init_params(cfg, plan.seed, jnp.float32)
    # A smaller embedding gives the outputs of the first layers weight from the start.
    params["embed"] = params["embed"] * 0.3
    return TrainState(params, make_optimizer(plan).init(params))


@functools.cache
def make_train_step(cfg: Config, plan: TrainingSchedule, *, with_mtp: bool, chat_weight: float) -> TrainStep:
    """Compiles the step ``(state, (code, chat), rate, bias_rate) -> (state, metrics)``; the state is donated."""
    optimizer = make_optimizer(plan)

    def step(
        state: TrainState, batches: tuple[TokenBatch, TokenBatch], rate: jax.Array, bias_rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        gradient, metrics, loads = _gradient(cfg, plan, state.params, batches, with_mtp, chat_weight)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, jax.tree.map(lambda u: u * rate, updates))
        metrics["grad_norm"] = optax.tree.norm(gradient)
        return TrainState(update_router_biases(params, loads, bias_rate), optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)


def _gradient(
    cfg: Config,
    plan: TrainingSchedule,
    params: Tree,
    batches: tuple[TokenBatch, TokenBatch],
    with_mtp: bool,
    chat_weight: float,
) -> tuple[Tree, Metrics, dict[str, jax.Array]]:
    def weighted_mean(code: jax.Array, chat: jax.Array) -> jax.Array:
        return (1 - chat_weight) * code + chat_weight * chat

    def objective(params: Tree) -> tuple[jax.Array, tuple[Losses, Losses]]:
        code, chat = (
            compute_losses(cfg, params, jnp.asarray(tokens), jnp.asarray(weights), with_mtp=with_mtp)
            for tokens, weights in batches
        )
        loss = weighted_mean(code.main / code.weight, chat.main / chat.weight)
        draft = weighted_mean(code.draft / code.draft_weight, chat.draft / chat.draft_weight)
        return loss + plan.mtp_weight * draft, (code, chat)

    (loss, (code, chat)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    loads = jax.tree.map(jnp.add, code.loads, chat.loads)
    metrics = {
        "loss": loss,
        "code": code.main / code.weight,
        "chat": chat.main / chat.weight,
        "draft": weighted_mean(code.draft / code.draft_weight, chat.draft / chat.draft_weight),
        "worst_load": jnp.max(jnp.stack([jnp.max(_relative_load(load)) for load in loads.values()])),
    }
    return gradient, metrics, loads


def _relative_load(load: jax.Array) -> jax.Array:
    return load / jnp.mean(load, axis=-1, keepdims=True)
