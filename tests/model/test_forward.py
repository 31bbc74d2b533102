"""The model against the NumPy reference: whole, in chunks with a cache, padded, step by step, and drafting."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.errors import ConfigError
from glm_jax.model import activation_names
from tests.builders.jitted_model import Array, is_close, make_positions, random_tokens
from tests.builders.small_models import MODEL_VARIANTS, OWN_MTP_MODEL, SmallModel

LENGTH = 24
FORMS = ["expanded", "absorbed"]


@pytest.fixture(params=MODEL_VARIANTS.values(), ids=list(MODEL_VARIANTS), scope="module")
def small(request: pytest.FixtureRequest) -> SmallModel:
    return request.param


def test_whole_and_every_activation(small: SmallModel) -> None:
    names, ids = activation_names(small.cfg), random_tokens(small.config, 2, LENGTH)
    logits, cache, trace = small.apply(ids, trace=names, attention=FORMS[small.seed % 2])
    assert cache is None
    assert logits.dtype == jnp.float32
    assert set(trace) == set(names)
    for row in range(2):
        record: dict[str, Array] = {}
        assert is_close(np.asarray(logits)[row], small.reference.logits(ids[row], record=record))
        assert set(record) == set(names)
        for name in names:
            assert trace[name].dtype == jnp.float32
            assert is_close(np.asarray(trace[name])[row], record[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 8])
def test_padded_batch_goes_on_row_by_row(chunk: int, form: str) -> None:
    check_rows(MODEL_VARIANTS["odd"], chunk, form)


@pytest.mark.parametrize("name", ["groups", "full_rank_queries", "alternating"])
def test_padded_batch_of_other_models(name: str) -> None:
    check_rows(MODEL_VARIANTS[name], chunk=8, form="absorbed")


def check_rows(small: SmallModel, chunk: int, form: str) -> None:
    """Three rows of different lengths: padded together in the first chunk, then each goes on from its own length.

    The cache starts full of large numbers: a slot that has not been written must not be seen.
    """
    ids, lengths = random_tokens(small.config, 3, LENGTH, seed=1), np.minimum([8, 5, 1], chunk)
    expected = [small.reference.logits(row) for row in ids]
    cache = small.cache(3, LENGTH)
    cache = type(cache)(jnp.full_like(cache.data, 1e4))
    at = np.zeros(3, int)
    for step in range(3):
        here = make_positions(ids[:, :chunk], at)
        piece = np.take_along_axis(ids, np.minimum(here, LENGTH - 1), axis=1)
        real = np.arange(chunk)[None] < (lengths if step == 0 else chunk + 0 * lengths)[:, None]
        logits, cache = small.apply(np.where(real, piece, 3), positions=here, cache=cache, attention=form)
        for row, start in enumerate(at):
            length = int(real[row].sum())
            assert is_close(np.asarray(logits)[row, :length], expected[row][start : start + length]), (step, row)
        at = at + real.sum(axis=1)


def test_cached_steps_equal_the_full_forward() -> None:
    small = MODEL_VARIANTS["odd"]
    ids, cache, steps = random_tokens(small.config, 3, 12, seed=4), small.cache(3, LENGTH), []
    for position in range(12):
        piece = ids[:, position : position + 1]
        logits, cache = small.apply(piece, positions=make_positions(piece, position), cache=cache, attention="absorbed")
        steps.append(np.asarray(logits))
    for row in range(3):
        assert is_close(np.concatenate(steps, axis=1)[row], small.reference.logits(ids[row]))


def test_the_cache_holds_normed_latent_and_rotated_key() -> None:
    small = MODEL_VARIANTS["odd"]
    ids, cache, expected = random_tokens(small.config, 3, 8), small.cache(3, LENGTH), small.reference.empty_cache()
    _, cache = small.apply(ids, positions=make_positions(ids), cache=cache, attention="absorbed")
    small.reference.hidden(ids[1], expected)
    assert cache.data.shape == (3, 3, LENGTH, 18)
    assert is_close(np.asarray(cache.data)[:, 1, :8], np.stack(expected[:3]))
    assert not np.asarray(cache.data)[:, :, 8:].any()


def test_only_differences_of_positions_matter() -> None:
    """Without a cache a token sees the tokens before it, whatever position the sequence starts at."""
    small = MODEL_VARIANTS["groups"]
    ids = random_tokens(small.config, 2, 11, seed=5)
    at_zero = np.asarray(small.apply(ids, positions=make_positions(ids))[0])
    moved = np.asarray(small.apply(ids, positions=make_positions(ids, [5, 0]))[0])
    assert is_close(at_zero[0], small.reference.logits(ids[0]))
    assert np.abs(moved - at_zero)[0].max() < 1e-4
    assert np.array_equal(moved[1], at_zero[1])


def test_logits_at_picks_one_position_per_row() -> None:
    small, at = MODEL_VARIANTS["odd"], np.array([10, 0, 4], np.int32)
    ids = random_tokens(small.config, 3, 11, seed=6)
    picked = np.asarray(small.apply(ids, logits_at=at)[0])
    assert picked.shape == (3, 1, 131)
    for row in range(3):
        assert is_close(picked[row, 0], small.reference.logits(ids[row])[at[row]])


@pytest.mark.parametrize("form", FORMS)
def test_long_context_in_key_blocks(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Above two key blocks the softmax is accumulated block by block."""
    monkeypatch.setattr("glm_jax.ops.mla.KEY_BLOCK", 4)
    small = SmallModel(MODEL_VARIANTS["one_dense_layer"].config, seed=13)
    ids, cache, parts = random_tokens(small.config, 2, LENGTH, seed=8), small.cache(2, 30), []
    for start in (0, 12):
        piece = ids[:, start : start + 12]
        logits, cache = small.apply(piece, positions=make_positions(piece, start), cache=cache, attention=form)
        parts.append(np.asarray(logits))
    for row in range(2):
        assert is_close(np.concatenate(parts, axis=1)[row], small.reference.logits(ids[row]))


# -- the prediction layer --------------------------------------------------------------------------------------------


DRAFTERS = {
    "odd": (MODEL_VARIANTS["odd"], "expanded"),
    "own": (OWN_MTP_MODEL, "absorbed"),
    "tied": (MODEL_VARIANTS["tied"], "absorbed"),
}


@pytest.mark.parametrize(("small", "form"), DRAFTERS.values(), ids=DRAFTERS)
def test_draft(small: SmallModel, form: str) -> None:
    """Chunks of 8 with the layer's own cache; a further draft step takes the returned state."""
    ids = random_tokens(small.config, 2, LENGTH + 1, seed=2)
    states = np.stack([small.reference.hidden(row[:-1]) for row in ids])
    hidden = states.astype(np.float32)
    cache, seen = small.cache(2, LENGTH, layers=1), []
    for start in range(0, LENGTH, 8):
        following = ids[:, start + 1 : start + 9]
        inputs = (hidden[:, start : start + 8], following)
        place = {"positions": make_positions(following, start), "cache": cache}
        logits, state, cache = small.apply(*inputs, method="draft", attention=form, **place)
        seen.append((np.asarray(logits), np.asarray(state)))
    for row, state in enumerate(states):
        expected, after = small.reference.draft(state, ids[row, 1:])
        assert is_close(np.concatenate([s[0] for s in seen], axis=1)[row], expected)
        assert is_close(np.concatenate([s[1] for s in seen], axis=1)[row], after)


def test_hidden_is_what_the_head_takes() -> None:
    small = MODEL_VARIANTS["odd"]
    ids = random_tokens(small.config, 1, 9, seed=9)
    hidden, cache = small.apply(ids, method="hidden")
    assert cache is None
    assert is_close(np.asarray(hidden)[0], small.reference.hidden(ids[0]))
    assert is_close(np.asarray(small.apply(np.asarray(hidden), method="head"))[0], small.reference.logits(ids[0]))


def test_draft_without_cache_and_from_its_own_state() -> None:
    small = MODEL_VARIANTS["full_rank_queries"]
    ids = random_tokens(small.config, 1, 10, seed=3)
    hidden = np.asarray(small.reference.hidden(ids[0, :8]), np.float32)
    logits, state, cache = small.apply(hidden[None], ids[:, 1:9], method="draft")
    assert cache is None
    expected, after = small.reference.draft(hidden.astype(np.float64), ids[0, 1:9])
    assert is_close(np.asarray(logits)[0], expected)
    again, _, _ = small.apply(np.asarray(state), ids[:, 2:10], method="draft")
    assert is_close(np.asarray(again)[0], small.reference.draft(after, ids[0, 2:10])[0])


def test_draft_of_a_model_without_the_layer() -> None:
    small = MODEL_VARIANTS["many_experts"]
    with pytest.raises(ConfigError, match="prediction layer"):
        small.apply(np.zeros((1, 2, 40), np.float32), np.zeros((1, 2), np.int32), method="draft")
