"""All methods to apply experts give the same result, for balanced loads and for hot experts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.ops import experts
from glm_jax.ops.router import Routing

EXPERTS, WIDTH, HIDDEN, CHOSEN = 8, 6, 10, 3


def _weights(rng: np.random.Generator) -> dict[str, Any]:
    shapes = {
        "gate": (1, EXPERTS, WIDTH, HIDDEN),
        "up": (1, EXPERTS, WIDTH, HIDDEN),
        "down": (1, EXPERTS, HIDDEN, WIDTH),
    }
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def _expected(x: np.ndarray, routing: Routing, w: dict[str, Any]) -> np.ndarray:
    gate, up, down = (np.asarray(w[name][0], np.float64) for name in ("gate", "up", "down"))
    out = np.zeros(x.shape)
    for token, (chosen, weights) in enumerate(
        zip(np.asarray(routing.expert_ids), np.asarray(routing.weights), strict=True)
    ):
        for expert, weight in zip(chosen, weights, strict=True):
            if expert < EXPERTS:
                g = gate[expert] @ x[token]
                out[token] += weight * (down[expert] @ (g / (1 + np.exp(-g)) * (up[expert] @ x[token])))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 7, 60])
@pytest.mark.parametrize("load", ["random", "warm", "hot", "some elsewhere"])
def test_methods_agree(tokens: int, load: str) -> None:
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, HIDDEN)).astype(np.float32), _weights(rng)
    chosen = np.stack([rng.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)]).astype(np.int32)
    if load == "warm":  # a few rows more than "batched" has room for; when hot, many more
        chosen[:, 0] = 2
    if load == "hot":
        chosen[:] = [2, 5, 7]
    if load == "some elsewhere":
        chosen[rng.random(chosen.shape) < 0.6] = EXPERTS  # on another device
    routing = Routing(jnp.asarray(chosen), jnp.asarray(rng.random((tokens, CHOSEN), np.float32)))
    routing = routing._replace(weights=jnp.where(routing.expert_ids < EXPERTS, routing.weights, 0.0))
    expected = _expected(x, routing, w)
    for method in ("pairs", "blocks", "batched", "dense"):
        found = jax.jit(lambda x, r, w, m=method: experts.apply_experts(x, r, w, 0, method=m))(x, routing, w)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=method)


def test_a_batch_is_used_only_where_nothing_is_copied() -> None:
    assert experts.select_expert_method(512, 4, 64, in_place=True) == "batched"
    assert experts.select_expert_method(512, 4, 64) == "blocks"
    assert experts.select_expert_method(8, 4, 64, in_place=True) == "pairs"
    assert experts.select_expert_method(512, 4, 8, in_place=True) == "dense"
