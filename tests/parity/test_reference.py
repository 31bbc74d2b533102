"""The NumPy reference against transformers: what the other tests lean on."""

import numpy as np
import pytest

from tests.parity import hf_models as theirs
from tests.parity.fixtures import Made
from tests.reference import Record

TOKENS = np.random.default_rng(5).integers(0, 131, 37)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_logits(made: Made, form: str) -> None:
    expected = theirs.logits(made.theirs, TOKENS[None])[0]
    error = np.abs(made.reference.logits(TOKENS, form=form) - expected).max()
    assert error <= 2e-5 * (1 + np.abs(expected).max())


def test_blocks(made: Made) -> None:
    record: Record = {}
    made.reference.hidden(TOKENS, record=record)
    for layer in range(made.reference.layers):
        x = record[f"block.{layer}.in"].astype(np.float32)[None]
        for name, expected in theirs.block(made.theirs, layer, x).items():
            error = np.abs(record[f"block.{layer}.{name}"] - expected[0]).max()
            assert error <= 2e-5 * (1 + np.abs(expected).max()), (layer, name)


def test_chunks_and_greedy(made: Made) -> None:
    cache = made.reference.empty_cache()
    chunks = [made.reference.logits(part, cache, form="absorbed") for part in np.split(TOKENS, [1, 9, 10, 30])]
    np.testing.assert_allclose(np.concatenate(chunks), made.reference.logits(TOKENS), atol=1e-10)
    assert made.reference.greedy(TOKENS, 12) == theirs.greedy(made.theirs, TOKENS.tolist(), 12)
