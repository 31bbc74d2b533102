"""The model is differentiable: its gradients against finite differences of the NumPy reference in float64."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model import GLM
from glm_jax.ops import experts
from glm_jax.ops.router import Routing
from glm_jax.weights.params import leaves_with_path
from tests.builders.hf_checkpoints import Tensors, to_params
from tests.builders.hf_configs import odd_size_config
from tests.builders.jitted_model import QUICK_COMPILE, Array, random_tokens
from tests.builders.small_models import MODEL_VARIANTS, SmallModel
from tests.reference import ReferenceModel


def loss_weights(small: SmallModel, ids: Array) -> Array:
    """Fixed random weights [2, T, V]: the loss is their product with the logits, and with the drafted logits if any."""
    shape = (2, len(ids) - 1, small.config["vocab_size"])
    return (np.random.default_rng(31).standard_normal(shape) / shape[1]).astype(np.float32)


def our_gradients(small: SmallModel, ids: Array, form: str) -> Any:
    weights = jnp.asarray(loss_weights(small, ids))
    model, inputs, following = GLM(small.cfg), jnp.asarray(ids[None, :-1]), jnp.asarray(ids[None, 1:])

    def loss(params: Any) -> jax.Array:
        variables = {"params": params}
        hidden: Any = model.apply(variables, inputs, method="hidden", attention=form)[0]
        logits: Any = model.apply(variables, hidden, method="head")
        if not small.cfg.num_nextn_predict_layers:
            return jnp.sum(weights[0] * logits[0])
        drafted: Any = model.apply(variables, hidden, following, method="draft", attention=form)[0]
        return jnp.sum(weights[0] * logits[0]) + jnp.sum(weights[1] * drafted[0])

    return jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)(small.params)


def reference_loss(small: SmallModel, tensors: Tensors, ids: Array) -> float:
    reference, weights = ReferenceModel(tensors, small.config), loss_weights(small, ids)
    hidden = reference.hidden(ids[:-1])
    loss = np.sum(weights[0] * reference.head(hidden))
    if small.cfg.num_nextn_predict_layers:
        loss += np.sum(weights[1] * reference.draft(hidden, ids[1:])[0])
    return float(loss)


def directions(small: SmallModel) -> dict[str, Tensors]:
    """A random direction for every kind of tensor: all tensors of that kind, over layers and experts, move together."""
    rng, kinds = np.random.default_rng(32), defaultdict(dict)
    for name, value in small.tensors.items():
        copies = (".embed_tokens.weight", ".shared_head.head.weight")
        if name.endswith("correction_bias") or (name.startswith("model.layers") and name.endswith(copies)):
            continue  # the bias decides only who is chosen; the copies are not kept
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        direction = rng.standard_normal(value.shape)
        kinds[kind][name] = direction / np.linalg.norm(direction)
    return dict(kinds)


def moved(small: SmallModel, direction: Tensors, step: float) -> Tensors:
    """The tensors, a step along a direction; the MTP copies stay equal to the main embedding and head."""
    tensors = {name: value.astype(np.float64) for name, value in small.tensors.items()}
    tensors |= {name: tensors[name] + step * change for name, change in direction.items()}
    if not small.cfg.num_nextn_predict_layers:
        return tensors
    mtp = f"model.layers.{small.cfg.num_hidden_layers}"
    tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{mtp}.shared_head.head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


SCANNED = SmallModel(odd_size_config(num_nextn_predict_layers=0), seed=35)
DRAFTED = SmallModel(odd_size_config(q_lora_rank=None, rope_interleave=False, num_hidden_layers=2), seed=34)
# The lengths choose the two sparse ways to apply the experts: sorted into blocks, and pair by pair.
GRADED = {"scanned_blocks": (SCANNED, "expanded", 7), "drafted_pairs": (DRAFTED, "absorbed", 3)}


@pytest.mark.parametrize(("small", "form", "length"), GRADED.values(), ids=GRADED)
def test_gradients_are_finite_differences(small: SmallModel, form: str, length: int) -> None:
    ids = random_tokens(small.config, length + 1, seed=30)
    assert experts.select_expert_method(length, 3, 7) == ("blocks" if length == 7 else "pairs")
    gradients = dict(leaves_with_path(our_gradients(small, ids, form)))
    zero = {key: np.zeros(value.shape) for key, value in small.tensors.items()}
    step = 1e-5
    for kind, direction in directions(small).items():
        ahead, behind = (reference_loss(small, moved(small, direction, s), ids) for s in (step, -step))
        expected = (ahead - behind) / (2 * step)
        along = dict(leaves_with_path(to_params({**zero, **direction}, small.cfg, np.float64)))
        actual = sum(float(np.sum(np.asarray(gradients[path], np.float64) * d)) for path, d in along.items())
        size = np.sqrt(
            sum(np.sum(np.square(gradients[path], dtype=np.float64)) for path, d in along.items() if d.any())
        )
        assert abs(actual - expected) <= 1e-4 * size, kind
        assert size > 0, kind
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all()
        assert path[-1] != "router_bias" or not np.asarray(gradient).any()


METHODS = ["pairs", "blocks", "batched", "dense"]


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_ways_to_apply_experts_agree(rows: int) -> None:
    """Values and gradients, with experts that no token chose and one that all tokens chose."""
    small = MODEL_VARIANTS["groups"]
    stacked = {name: small.params["runs"]["1"]["moe"][name] for name in ("gate", "up", "down")}
    rng = np.random.default_rng(33)
    x = jnp.asarray(rng.standard_normal((rows, 40)), jnp.float32)
    chosen = np.stack([np.array([3, *rng.choice([0, 5, 6, 9, 15], 3, replace=False)]) for _ in range(rows)])
    weights = jnp.asarray(rng.standard_normal(chosen.shape), jnp.float32)

    def run(method: Any, x: jax.Array, weights: jax.Array, stacked: Any) -> tuple[jax.Array, jax.Array]:
        routing = Routing(jnp.asarray(chosen, jnp.int32), weights)
        out = experts.apply_experts(x, routing, stacked, 1, method=method)
        return jnp.sum(jnp.sin(out)), out

    results = {}
    for method in METHODS:
        graded = jax.value_and_grad(lambda *a, m=method: run(m, *a), argnums=(0, 1, 2), has_aux=True)
        results[method] = jax.jit(graded, compiler_options=QUICK_COMPILE)(x, weights, stacked)
    exact = np.zeros((rows, 40))
    for row in range(rows):
        for expert, weight in zip(chosen[row], np.asarray(weights, np.float64)[row], strict=True):
            name = f"model.layers.2.mlp.experts.{expert}"
            exact[row] += weight * small.reference._swiglu(name, np.asarray(x, np.float64)[row])
    for method in METHODS:
        (_, out), gradients = results[method]
        np.testing.assert_allclose(out, exact, atol=1e-5, rtol=1e-5)
        for ours, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(results["dense"][1]), strict=True):
            np.testing.assert_allclose(ours, other, atol=2e-5, rtol=1e-4)
