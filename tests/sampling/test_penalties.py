"""Effect and order of the sampling steps on scores and on the tokens kept, by tables and against a reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.errors import SamplingError
from glm_jax.sampling import SamplerFeatures, SamplerState, SamplingParams
from glm_jax.sampling.penalties import process_logits
from glm_jax.sampling.thresholds import apply_filters
from tests.sampling import numpy_reference

INF = float("inf")
WIDTH = 12
NEVER = 100.0  # gap that noise cannot overcome, since noise spans less than 26
LARGEST = float(np.finfo(np.float32).max)
EVERYTHING = SamplerFeatures(penalties=True, filters=True, bias=True, logprobs=2)


@jax.jit
def scores_and_gaps(logits, state):
    scores = process_logits(logits, state)
    return scores, apply_filters(scores, state)


def run(logits, params, *, prompt=(), output=(), valid_vocab=None):
    """The scores of one row with this output so far, and the ids that can be sampled."""
    padded = np.full((1, max(len(logits), WIDTH)), -INF, np.float32)  # few widths: few compilations
    padded[0, : len(logits)] = logits
    state = numpy_reference.make_sampler_state(
        params, padded.size, prompt=prompt, valid_vocab=valid_vocab, features=EVERYTHING
    )
    counts = np.bincount(np.asarray(output, np.int64), minlength=padded.size)[None].astype(np.int32)
    scores, gap = scores_and_gaps(padded, dataclasses.replace(state, counts=jnp.asarray(counts)))
    return np.asarray(scores)[0, : len(logits)], set(np.flatnonzero(np.asarray(gap)[0] < NEVER).tolist())


def logs(*weights):
    """Logits of probabilities proportional to these weights."""
    return np.log(np.asarray(weights, np.float64)).astype(np.float32)


FILTERS = [
    # Each filter alone. Probabilities keep away from float32 rounding, except in the cases about it.
    ("all off", {"top_p": 1}, logs(5, 3, 1, 1), {0, 1, 2, 3}),
    ("top_k", {"top_p": 1, "top_k": 2}, [1.0, 3.0, 2.0, 0.0], {1, 2}),
    ("top_k of the width", {"top_p": 1, "top_k": 4}, [1.0, 3.0, 2.0, 0.0], {0, 1, 2, 3}),
    ("top_k beyond the width", {"top_p": 1, "top_k": 99}, [1.0, 3.0, 2.0, 0.0], {0, 1, 2, 3}),
    ("top_k keeps ties", {"top_p": 1, "top_k": 2}, [2.0, 3.0, 2.0, 2.0], {0, 1, 2, 3}),
    ("top_k keeps ties of zeros", {"top_p": 1, "top_k": 2}, [-0.0, 3.0, 0.0, -1.0], {0, 1, 2}),
    ("top_k 1 keeps equal maxima", {"top_p": 1, "top_k": 1}, [3.0, 3.0, 2.0, 3.0], {0, 1, 3}),
    ("top_k tells neighbors apart", {"top_p": 1, "top_k": 1}, [1.0, np.nextafter(np.float32(1), 2), 0.0], {1}),
    ("top_k among negatives", {"top_p": 1, "top_k": 2}, [-5.0, -1.0, -3.0, -2.0], {1, 3}),
    ("top_k with fewer possible", {"top_p": 1, "top_k": 3}, [1.0, -INF, -INF, 0.0], {0, 3}),
    ("top_p keeps the one that crosses", {"top_p": 0.6}, logs(5, 3, 1, 1), {0, 1}),
    ("top_p just below", {"top_p": 0.49}, logs(5, 3, 1, 1), {0}),
    ("top_p exactly reached", {"top_p": 0.5}, [1.0, 1.0, -INF, -INF], {0, 1}),
    ("top_p keeps ties", {"top_p": 0.81}, logs(5, 3, 1, 1), {0, 1, 2, 3}),
    ("top_p of a flat row", {"top_p": 0.1}, [7.0] * 5, {0, 1, 2, 3, 4}),
    ("top_p tiny keeps the maximum", {"top_p": 1e-9}, logs(3, 4, 3), {1}),
    ("top_p that rounds to 1 in float32", {"top_p": 1 - 1e-12}, logs(1, 2, 1e-9), {0, 1, 2}),
    ("min_p", {"top_p": 1, "min_p": 0.3}, logs(10, 4, 2, 1), {0, 1}),
    ("min_p 1 keeps equal maxima", {"top_p": 1, "min_p": 1.0}, [2.0, 2.0, 1.9999999], {0, 1}),
    ("min_p does not depend on the total", {"top_p": 1, "min_p": 0.3}, logs(10, 4, *[1] * 10), {0, 1}),
    ("temperature spreads", {"top_p": 0.6, "temperature": 4.0}, logs(16, 1, 1, 1), {0, 1, 2, 3}),
    ("temperature narrows", {"top_p": 0.6, "temperature": 0.5}, logs(3, 2, 2, 2), {0, 1, 2, 3}),
    ("temperature narrows to one", {"top_p": 0.6, "temperature": 0.25}, logs(3, 2, 2, 2), {0}),
    # Order of the filters.
    ("top_p applies to the tokens left by top_k", {"top_p": 0.55, "top_k": 2}, logs(4, 3, 2, 1), {0}),
    ("the same top_p without top_k", {"top_p": 0.55}, logs(4, 3, 2, 1), {0, 1}),
    ("top_p applies to the tokens left by min_p", {"top_p": 0.55, "min_p": 0.6}, logs(4, 3, 2, 1), {0}),
    ("top_k ties count in top_p", {"top_p": 0.7, "top_k": 2}, logs(4, 2, 2, 1), {0, 1, 2}),
    ("min_p after the temperature", {"top_p": 1, "min_p": 0.3, "temperature": 2.0}, logs(16, 4, 1), {0, 1}),
    ("bias before top_k", {"top_p": 1, "top_k": 1, "logit_bias": {2: 5.0}}, [1.0, 2.0, 0.0], {2}),
    ("bias before the temperature", {"top_p": 1, "min_p": 0.5, "temperature": 50, "logit_bias": {0: 99}}, [0, 0], {0}),
    # Extremes.
    ("an infinite gap is excluded", {"top_p": 1}, [LARGEST, -LARGEST, 0.0], {0}),
    ("+inf is the largest float", {"top_p": 1}, [INF, LARGEST, 1.0], {0, 1}),
    ("NaN is never sampled", {"top_p": 1}, [float("nan"), 1.0, 2.0], {1, 2}),
    ("nothing to sample", {}, [-INF, -INF], set()),
    ("huge numbers keep their order", {"top_p": 1, "top_k": 2}, [1e38, 3e38, 2e38, -3e38], {1}),
    ("temperature at its smallest", {"top_p": 1, "temperature": 1e-5}, [1.0, 1.0, 0.99], {0, 1}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "logits", "expected"), [c[1:] for c in FILTERS], ids=[c[0] for c in FILTERS])
def test_filters_keep_the_expected_tokens(options, logits, expected):
    _, allowed = run(logits, SamplingParams(**options))
    assert allowed == expected


SCORES = [
    ("nothing", {}, (), (), [1.0, -1.0, 0.0, 2.0], [1.0, -1.0, 0.0, 2.0]),
    ("bias", {"logit_bias": {0: 2.0, 3: -0.5}}, (), (), [1.0, -1.0, 0.0, 2.0], [3.0, -1.0, 0.0, 1.5]),
    ("bias does not revive -inf", {"logit_bias": {0: 100.0}}, (), (), [-INF, 1.0], [-INF, 1.0]),
    ("repetition of the prompt", {"repetition_penalty": 2.0}, (0, 1), (), [1.0, -1.0, 3.0], [0.5, -2.0, 3.0]),
    ("repetition of the output", {"repetition_penalty": 2.0}, (), (2, 2), [1.0, -1.0, 3.0], [1.0, -1.0, 1.5]),
    ("repetition counts once", {"repetition_penalty": 2.0}, (2, 2), (2,), [1.0, -1.0, 3.0], [1.0, -1.0, 1.5]),
    ("a reward", {"repetition_penalty": 0.5}, (0, 1), (), [1.0, -1.0], [2.0, -0.5]),
    ("repetition of zero", {"repetition_penalty": 2.0}, (0,), (), [0.0, 1.0], [0.0, 1.0]),
    ("repetition of -inf", {"repetition_penalty": 0.01}, (0,), (), [-INF, 1.0], [-INF, 1.0]),
    ("a reward beyond float32", {"repetition_penalty": 0.5}, (0,), (), [LARGEST, 1.0], [LARGEST, 1.0]),
    ("presence ignores the prompt", {"presence_penalty": 1.5}, (0,), (1,), [1.0, 1.0], [1.0, -0.5]),
    ("presence counts once", {"presence_penalty": 1.5}, (), (1, 1), [1.0, 1.0], [1.0, -0.5]),
    ("presence may reward", {"presence_penalty": -1.5}, (), (1,), [1.0, 1.0], [1.0, 2.5]),
    ("frequency ignores the prompt", {"frequency_penalty": 0.5}, (0,), (1,), [1.0, 1.0], [1.0, 0.5]),
    ("frequency counts all", {"frequency_penalty": 0.5}, (), (1, 1, 0, 1), [1.0, 1.0], [0.5, -0.5]),
    # The order gives (1 + 3) / 2 - 0.5 * 2 - 0.25; any other order gives another number.
    (
        "bias, repetition, frequency and presence",
        {"logit_bias": {0: 3.0}, "repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25},
        (),
        (0, 0),
        [1.0, 9.0],
        [0.75, 9.0],
    ),
    # 1 - 3 is negative before the repetition penalty, which therefore multiplies.
    ("bias decides the sign", {"logit_bias": {0: -3.0}, "repetition_penalty": 2.0}, (0,), (), [1.0, 0.0], [-4.0, 0.0]),
]


@pytest.mark.parametrize(
    ("options", "prompt", "output", "logits", "expected"), [c[1:] for c in SCORES], ids=[c[0] for c in SCORES]
)
def test_scores(options, prompt, output, logits, expected):
    scores, _ = run(logits, SamplingParams(**options), prompt=prompt, output=output)
    np.testing.assert_array_equal(scores, np.asarray(expected, np.float32))


def test_unknown_ids_are_never_sampled_even_with_a_bias():
    params = SamplingParams(logit_bias={2: 100.0, 3: 100.0}, top_p=1)
    scores, allowed = run([0.0, 0.0, 50.0, INF], params, valid_vocab=2)
    np.testing.assert_array_equal(scores, [0, 0, -INF, -INF])
    assert allowed == {0, 1}


numbers = st.floats(-30, 30, width=32, allow_subnormal=False)
# A few repeated values make ties; the others are spread out, huge or -inf.
logit = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.5, -4.0]), numbers, st.sampled_from([-INF, 3e38, -3e38, 1e30]))
rows = st.lists(logit, min_size=12, max_size=12).filter(lambda row: max(row) > -INF)
tokens = st.lists(st.integers(0, 11), max_size=6)
sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 20),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    top_k=st.integers(0, 14),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.25, 4)),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=8),
)


@given(rows, sampling, tokens, tokens, st.sampled_from([5, 12]))
def test_scores_match_the_reference(logits, params, prompt, output, valid_vocab):
    scores, _ = run(logits, params, prompt=prompt, output=output, valid_vocab=valid_vocab)
    expected = numpy_reference.penalized_logits(np.asarray(logits, np.float32), params, prompt, output, valid_vocab)
    comparable = np.abs(expected) < LARGEST / 2  # beyond, float32 may overflow
    # Nine roundings, four of them of options, of numbers up to |logit| + 100, scaled by at most 4.
    size = 4 * (np.abs(np.asarray(logits)[comparable]) + 100) + 2 * len(output) + 2
    assert np.all(np.abs(scores[comparable] - expected[comparable]) <= 9 * 2.0**-24 * size)
    assert np.all(np.isneginf(scores[np.isneginf(expected)]))
    assert np.all(scores <= LARGEST)


@given(rows, sampling)
def test_filters_match_a_sort(logits, params):
    params = params.replace(repetition_penalty=1.0, logit_bias=None)
    scores, allowed = run(logits, params)
    expected, certain = numpy_reference.kept_tokens(scores.astype(np.float64), params)
    kept = np.isin(np.arange(12), list(allowed))
    np.testing.assert_array_equal(kept[certain], expected[certain])


@given(rows, sampling)
def test_kept_tokens_are_the_most_likely_ones(logits, params):
    scores, allowed = run(logits, params)
    lowest = min(scores[list(allowed)])
    assert allowed == set(np.flatnonzero(scores >= lowest).tolist())
    assert scores.argmax() in allowed


@pytest.mark.parametrize("width", [33, 1025])
def test_filters_on_wide_rows(width):
    rng = np.random.default_rng(width)
    for top_k, top_p, min_p in [(7, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.5, 0.01), (0, 1.0, 0.05)]:
        params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.8)
        logits = (rng.normal(size=width) * 4).round(2).astype(np.float32)  # rounded: ties
        expected, certain = numpy_reference.kept_tokens(logits.astype(np.float64), params)
        _, allowed = run(logits, params)
        np.testing.assert_array_equal(np.isin(np.arange(width), list(allowed))[certain], expected[certain])


def create(params, prompt=(1,), **options):
    return SamplerState.create([params], [0], [prompt], **({"vocab_size": 8, "valid_vocab": 8} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create(SamplingParams(logit_bias={8: 1.0})), r"logit_bias: token id 8 is outside .*\[0, 8\)"),
        (lambda: create(SamplingParams(stop_token_ids=(3, 9))), "stop_token_ids: token id 9 is outside"),
        (lambda: create(SamplingParams(), prompt=[-1]), "the prompt: token id -1 is"),
        (lambda: create(SamplingParams(), valid_vocab=9), r"valid_vocab must be in \[1, 8\]"),
        (lambda: create(SamplingParams(), valid_vocab=0), r"valid_vocab must be in \[1, 8\]"),
        (lambda: create(SamplingParams(), features=SamplerFeatures()), "filters=True.*does not cover"),
        (lambda: SamplerState.create([], [], [], vocab_size=8, valid_vocab=8), "at least one: got 0, 0 and 0"),
        (lambda: SamplerState.create([SamplingParams()], [0, 1], [[]], vocab_size=8, valid_vocab=8), "got 1, 2 and 1"),
        (lambda: SamplerState.create([SamplingParams()], [2**63], [[]], vocab_size=8, valid_vocab=8), "a seed must be"),
    ],
)  # fmt: skip
def test_invalid_batches_are_rejected(make, message):
    with pytest.raises(SamplingError, match=message):
        make()


def test_only_needed_arrays_are_allocated():
    state = create(SamplingParams(temperature=0))
    assert (state.counts, state.in_prompt, state.bias_ids, state.bias_values) == (None, None, None, None)
    state = create(SamplingParams(frequency_penalty=1, logit_bias=dict.fromkeys(range(8), 0.5)))
    assert state.counts.shape == state.in_prompt.shape == (1, 8)
    assert state.bias_ids.shape == (1, 8)
    wide = create(SamplingParams(logit_bias=dict.fromkeys(range(9), 0.5)), vocab_size=16, valid_vocab=16)
    assert wide.bias_ids.shape == (1, 16)
    assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(wide))
