"""The optimizer: Muon for matrices, Adam for all other parameters, and load balancing by router biases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from examples.tiny_recipe.schedule import TrainingSchedule

Tree = dict[str, Any]
# Lookup tables rather than linear maps; orthogonalizing their updates would make no sense.
ADAM_PARAMETERS = frozenset({"embed", "head", "router", "router_bias"})


def make_optimizer(plan: TrainingSchedule) -> optax.GradientTransformation:
    """The optimizer at the highest learning rates; the caller scales updates by ``plan.learning_rate_scale(step)``.

    Muon (Jordan 2024) in optax's form, with AOL preconditioning, which saves one of five Newton-Schulz steps.
    """
    muon_and_adam = muon(
        plan.matrix_rate,
        ns_steps=4,
        preconditioning="aol",
        weight_decay=plan.weight_decay,
        adam_learning_rate=plan.vector_rate,
        adam_b2=0.98,
        muon_weight_dimension_numbers=_dimensions,  # pyright: ignore[reportArgumentType]  (optax's own protocol is narrower)
    )
    embeddings = optax.masked(
        optax.scale(plan.embed_factor), lambda tree: jax.tree_util.tree_map_with_path(_is_embed, tree)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon_and_adam, embeddings)


def update_router_biases(params: Tree, loads: dict[str, jax.Array], rate: jax.Array) -> Tree:
    """Moves each router bias by ``rate`` towards equal load, without an auxiliary loss (arXiv 2408.15664).

    Args:
        params: Parameters of the model.
        loads: Tokens per expert ``float32 [l, E]`` by path of the layer group ("runs/1") or "mtp".
        rate: Step size, a ``float32`` scalar.
    """

    def move(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        load = loads.get("/".join(names[:-2]))
        if names[-1] != "router_bias" or load is None:
            return value
        return value + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    return jax.tree_util.tree_map_with_path(move, params)


def _dimensions(params: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(_leaf_dimensions, params)


def _leaf_dimensions(path: tuple[Any, ...], value: jax.Array) -> MuonDimensionNumbers | None:
    names = [key.key for key in path]
    if names[-1] in ADAM_PARAMETERS or names[-1].endswith("norm"):
        return None
    last = value.ndim - 1
    # k_b and v_b ``[l, N, H, R]`` are one matrix with N * H rows.
    output = (last - 2, last - 1) if names[-1] in ("k_b", "v_b") else last - 1
    return MuonDimensionNumbers(reduction_axis=last, output_axis=output)


def _is_embed(path: tuple[Any, ...], _: Any) -> bool:
    return path[0].key == "embed"
