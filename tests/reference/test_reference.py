"""The NumPy reference against numbers worked out by hand, and against itself where two forms must agree."""

import numpy as np
import pytest

from tests.builders.hf_checkpoints import random_tensors
from tests.builders.hf_configs import odd_size_config
from tests.reference import ReferenceModel, layers

ROUTER = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.8}


def test_rope_golden() -> None:
    theta = 1e6 ** (1 / 16)  # the first two frequencies of a width of 64 at base 1e6, from a width of 4
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    turned = layers.apply_rope(x, np.array([3]), theta, interleave=True)
    np.testing.assert_allclose(turned, [[-1.272233, -1.838865, -4.823950, 1.315107]], atol=1e-6)


def test_half_split_rope_is_interleaved_rope_of_reordered_dimensions() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 8))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    positions = np.arange(5)
    split = layers.apply_rope(x[..., order], positions, 1e4, interleave=False)
    np.testing.assert_allclose(split, layers.apply_rope(x, positions, 1e4, interleave=True)[..., order], atol=1e-12)


def test_router_golden() -> None:
    logits = np.array([[2, -1, 0.5, 1.9, -3, 0]])
    weights = layers.route(logits, np.array([0, 0.9, 0, 0.1, 0, 0]), ROUTER)
    np.testing.assert_allclose(weights, [[0, 0.42508, 0, 1.37492, 0, 0]], atol=1e-5)


def test_router_groups() -> None:
    # Group 1 has the best single expert, groups 0 and 2 the best pairs: experts come from groups 0 and 2 only.
    biased = np.array([0.6, 0.55, 0.99, 0.01, 0.7, 0.4])
    assert set(layers.select_experts(biased, 3, 2, 3)) == {4, 0, 1}
    assert set(layers.select_experts(biased, 1, 1, 3)) == {2, 4, 0}


def test_router_without_normalization_keeps_the_sigmoids() -> None:
    weights = layers.route(np.zeros((1, 6)), np.arange(6.0), {**ROUTER, "norm_topk_prob": False})
    np.testing.assert_allclose(weights, [[0, 0, 0, 0, 0.9, 0.9]])


@pytest.mark.parametrize("own", [False, True], ids=["shared_table", "own_table"])
def test_draft_in_chunks_and_absorbed(own: bool) -> None:
    config = odd_size_config(num_nextn_predict_layers=1)
    reference = ReferenceModel(random_tensors(config, 3, own_mtp=own), config)
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 17)
    hidden = reference.hidden(tokens[:-1])
    whole, state = reference.draft(hidden, tokens[1:])
    cache = reference.empty_cache()
    cuts = [slice(0, 5), slice(5, 6), slice(6, 16)]
    parts = [reference.draft(hidden[c], tokens[1:][c], cache, form="absorbed") for c in cuts]
    np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), whole, atol=1e-10)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), state, atol=1e-10)


def test_draft_takes_the_embedding_first() -> None:
    config = odd_size_config(num_nextn_predict_layers=1)
    tensors = random_tensors(config, 4)
    name, width = f"model.layers.{config['num_hidden_layers']}.eh_proj.weight", config["hidden_size"]
    tensors[name] = np.concatenate([np.zeros((width, width)), np.eye(width)], axis=1)
    reference = ReferenceModel(tensors, config)
    hidden = np.random.default_rng(2).standard_normal((4, width))
    first, _ = reference.draft(hidden, [1, 2, 3, 4])
    second, _ = reference.draft(hidden, [9, 8, 7, 6])
    np.testing.assert_array_equal(first, second)
