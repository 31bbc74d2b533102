"""Our model against transformers on every checkpoint: whole, block by block, in chunks, padded and greedy."""

from collections.abc import Callable

import numpy as np
import pytest

from glm_jax.config import Config
from glm_jax.model import activation_names
from glm_jax.weights.params import leaves_with_path
from tests.builders.hf_checkpoints import read_tensors, to_params
from tests.builders.jitted_model import Array, is_close, make_positions, random_tokens, tolerance_ratio
from tests.parity import hf_models
from tests.parity.fixtures import SavedCheckpoint

LENGTH, CAPACITY = 20, 32
FORMS = ["expanded", "absorbed"]


def test_the_loader_agrees_with_a_mapping_by_hand(made: SavedCheckpoint) -> None:
    cfg = Config.from_hf(made.config).replace(num_nextn_predict_layers=0)
    assert made.jitted_model.cfg == cfg  # transformers saves no prediction layer, whatever config.json says
    loaded, expected = (
        dict(leaves_with_path(made.jitted_model.params)),
        dict(leaves_with_path(to_params(read_tensors(made.folder), cfg))),
    )
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[path], expected[path]) for path in expected)


def test_whole_and_block_by_block(made: SavedCheckpoint, record_property: Callable[[str, object], None]) -> None:
    """Each block of transformers gets our input of that block, so that no block's error hides in another's."""
    ids = random_tokens(made.config, 1, LENGTH)
    names = activation_names(made.jitted_model.cfg)
    logits, _, trace = made.jitted_model.apply(ids, trace=names, attention="expanded")
    expected = hf_models.compute_logits(made.hf_model, ids)
    worst = {"logits": tolerance_ratio(logits, expected)}
    for layer in range(made.jitted_model.cfg.num_hidden_layers):
        outputs = hf_models.block_activations(made.hf_model, layer, np.array(trace[f"block.{layer}.in"]))
        for name, value in outputs.items():
            worst[f"block.{layer}.{name}"] = tolerance_ratio(trace[f"block.{layer}.{name}"], value)
    points = {name for name in names if name.startswith("block.") and not name.endswith(".in")}
    assert set(worst) == {"logits", *points}
    record_property("largest_error_of_logits", float(np.abs(np.asarray(logits) - expected).max()))
    assert max(worst.values()) <= 1, worst


def test_absorbed(made: SavedCheckpoint) -> None:
    ids = random_tokens(made.config, 1, LENGTH, seed=1)
    assert is_close(made.jitted_model.apply(ids, attention="absorbed")[0], hf_models.compute_logits(made.hf_model, ids))


@pytest.mark.parametrize("form", FORMS)
def test_padded_batch_and_chunks(made: SavedCheckpoint, form: str) -> None:
    """Sequences padded on the right equal each sequence alone, whole and in chunks with a cache."""
    ids, lengths = random_tokens(made.config, 3, LENGTH, seed=2), np.array([LENGTH, 11, 1])
    expected = [hf_models.compute_logits(made.hf_model, row[None])[0] for row in ids]
    batched = hf_models.compute_logits(made.hf_model, ids, lengths.tolist())
    whole = in_pieces(made, ids, [lengths], form)
    pieces = in_pieces(made, ids, [np.array([9, 4, 1]), np.array([1, 6, 13]), np.array([10, 10, 6])], form)
    for row, length in enumerate(lengths):
        assert is_close(whole[row], expected[row][:length])
        assert is_close(whole[row], batched[row, :length])
        assert is_close(pieces[row], expected[row])


def in_pieces(made: SavedCheckpoint, ids: Array, pieces: list[Array], form: str) -> list[Array]:
    """Returns each sequence's logits; step i processes `pieces[i][row]` of its tokens, padded to one length."""
    cache, at = made.jitted_model.cache(3, CAPACITY), np.zeros(3, int)
    seen: list[list[Array]] = [[], [], []]
    for lengths in pieces:
        place = make_positions(ids, at)
        piece = np.take_along_axis(ids, np.minimum(place, LENGTH - 1), axis=1)
        logits, cache = made.jitted_model.apply(piece, positions=place, cache=cache, attention=form)
        for row, length in enumerate(lengths):
            seen[row].append(np.asarray(logits)[row, :length])
        at = at + lengths
    return [np.concatenate(parts) for parts in seen]


def test_greedy_tokens(made: SavedCheckpoint) -> None:
    """In a padded batch, each sequence gets the greedy tokens that transformers generates for it alone."""
    ids, lengths = random_tokens(made.config, 3, LENGTH, seed=3), np.array([LENGTH, 11, 1])
    cache = made.jitted_model.cache(3, CAPACITY)
    logits, cache = made.jitted_model.apply(ids, positions=make_positions(ids), cache=cache, attention="expanded")
    new = [np.asarray(logits)[np.arange(3), lengths - 1].argmax(-1)]
    for step in range(11):
        latest = new[-1].astype(np.int32)[:, None]
        place = make_positions(latest, lengths + step)
        logits, cache = made.jitted_model.apply(latest, positions=place, cache=cache, attention="absorbed")
        new.append(np.asarray(logits)[:, 0].argmax(-1))
    for row, length in enumerate(lengths):
        expected = hf_models.greedy_tokens(made.hf_model, ids[row, :length].tolist(), 12)
        assert np.stack(new, axis=1)[row].tolist() == expected
