"""The NumPy reference, on which the other tests rely, against transformers."""

import numpy as np
import pytest

from tests.parity import hf_models
from tests.parity.fixtures import SavedCheckpoint
from tests.reference import ActivationRecord

TOKENS = np.random.default_rng(5).integers(0, 131, 37)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_logits(made: SavedCheckpoint, form: str) -> None:
    expected = hf_models.compute_logits(made.hf_model, TOKENS[None])[0]
    error = np.abs(made.reference.logits(TOKENS, form=form) - expected).max()
    assert error <= 2e-5 * (1 + np.abs(expected).max())


def test_blocks(made: SavedCheckpoint) -> None:
    record: ActivationRecord = {}
    made.reference.hidden(TOKENS, record=record)
    for layer in range(made.reference.layers):
        x = record[f"block.{layer}.in"].astype(np.float32)[None]
        for name, expected in hf_models.block_activations(made.hf_model, layer, x).items():
            error = np.abs(record[f"block.{layer}.{name}"] - expected[0]).max()
            assert error <= 2e-5 * (1 + np.abs(expected).max()), (layer, name)


def test_chunks_and_greedy(made: SavedCheckpoint) -> None:
    cache = made.reference.empty_cache()
    chunks = [made.reference.logits(part, cache, form="absorbed") for part in np.split(TOKENS, [1, 9, 10, 30])]
    np.testing.assert_allclose(np.concatenate(chunks), made.reference.logits(TOKENS), atol=1e-10)
    assert made.reference.greedy(TOKENS, 12) == hf_models.greedy_tokens(made.hf_model, TOKENS.tolist(), 12)
