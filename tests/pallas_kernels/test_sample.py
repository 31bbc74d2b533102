"""The sampler's kernels give the tokens of the sampler in plain JAX, for the same logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.model.fused_decode import ResidualStream
from glm_jax.model.fused_sampling import sample_from_residual
from glm_jax.sampling import SamplerFeatures, SamplerState, SamplingParams, sample, update_state
from glm_jax.sampling.gumbel import gumbel_noise
from glm_jax.sampling.numerics import token_ids_like
from pallas_kernels._interpreter import interpret
from pallas_kernels._kernel import Operands
from pallas_kernels.quant_matmul.config import LinearConfig
from pallas_kernels.quant_matmul.reference import inv_rms_ref
from pallas_kernels.sample import SamplingTensors, Vocabulary, filter_thresholds, lm_head_sample, sample_logits
from pallas_kernels.sample.config import SampleConfig
from pallas_kernels.sample.reference import gumbel_noise_ref, scaled_gaps_ref
from tests.pallas_kernels.builders import make_random_tiles, random_normal, random_sum_sq
from tests.pallas_kernels.references import dequantize_tiles, make_tiles

pytestmark = pytest.mark.kernels
INF, NAN = float("inf"), float("nan")
SMALL = SampleConfig(block_v=256, blocks_per_sum=2)


def state_of(params, width, **options):
    options = {"valid_vocab": width, "eos_ids": (1,), **options}
    seeds = [2**40 * i + 7 * i for i in range(len(params))]
    return SamplerState.create(params, seeds, [(1, 2)] * len(params), vocab_size=width, **options)


def rows_of(state, positions):
    """Sampling parameters of the kernels; ``positions`` are those of the sampled tokens, as in the sampler."""
    names = ("temperature", "top_k", "top_p", "min_p", "seeds")
    return SamplingTensors(**{name: getattr(state, name) for name in names}, positions=positions - 1)


def positions_of(count, first=5):
    return first + 1000 * jnp.arange(count, dtype=jnp.int32)


def by_kernels(logits, state, positions, config=SMALL, **options):
    """Tokens of logits; the counters must be left at zero."""
    features = state.features
    options = {"has_filters": features.filters, "has_random": not features.greedy_only, "config": config, **options}
    vocabulary = Vocabulary(state.valid_vocab, state.unused_ids)
    counters = jnp.zeros(64, jnp.int32)
    run = jax.jit(lambda x, c: sample_logits(x, rows_of(state, positions), vocabulary, c, **options))
    output, after = run(jnp.asarray(logits), counters)
    assert not np.any(after), "counters must be left at zero"
    return output


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(top_p=1),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.7, min_p=0.02),
    SamplingParams(temperature=2, top_k=3, top_p=1),
    SamplingParams(top_p=0.2, min_p=0.3),
]


@pytest.mark.parametrize("width", [pytest.param(301, marks=pytest.mark.soak), 5])
def test_tokens_of_logits(width):
    """Ties (rounded logits), ids that do not exist, rows of every kind side by side."""
    rng = np.random.default_rng(width)
    logits = (rng.normal(size=(len(MIXED), width)) * 3).round(1).astype(np.float32)
    known = {"valid_vocab": width - 2, "unused_ids": (0, 2)} if width > 5 else {}
    state = state_of(MIXED, width, features=SamplerFeatures(filters=True, logprobs=0), **known)
    positions = positions_of(len(MIXED))
    expected = jax.jit(sample)(logits, state, positions)
    found = by_kernels(logits, state, positions, return_logprob=True)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.ok.all()
    np.testing.assert_allclose(found.logprob, expected.logprob, rtol=0, atol=4e-6)
    reference = by_kernels(logits, state, positions, return_logprob=True, implementation="reference")
    assert reference.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(reference.logprob, expected.logprob, rtol=0, atol=4e-6)


def test_noise_is_that_of_the_sampler():
    from tests.pallas_kernels.gumbel_kernel import gumbel_noise_kernel

    width = 1 << 16
    for seed, position in [((0, 0), 0), ((1 << 30, 2**32 - 1), 131_072)]:
        given = (jnp.asarray(seed, jnp.uint32), jnp.full(1, position - 1, jnp.int32))
        operands = Operands(inputs=("seed", "position"), outputs={"out": jax.ShapeDtypeStruct((width,), jnp.float32)})
        (found,) = interpret(gumbel_noise_kernel, operands, (1,), {"N": width}, *given)
        np.testing.assert_array_equal(
            gumbel_noise_ref(given[0][None], given[1], width)[0],
            gumbel_noise(given[0][None], given[1] + 1, token_ids_like(jnp.zeros((1, width))))[0],
        )
        expected = gumbel_noise(given[0][None], given[1] + 1, token_ids_like(jnp.zeros((1, width))))[0]
        # Two logarithms, of which the inner one is near 1 for most ids: nothing may be lost there.
        np.testing.assert_allclose(found, expected, rtol=4e-7, atol=4e-7)
        assert found.max() > 9


BAD = [
    ([0.0, 90.0, 1.0, 2.0], 1, True),
    ([-INF, -INF, 1.0, -INF], 2, True),
    ([NAN, 90.0, 1.0, 2.0], 1, False),
    ([NAN] * 4, 0, False),
    ([-INF] * 4, 0, False),
    ([0.0, INF, 1.0, 2.0], 1, False),
    ([0.0, 90.0, 1.0, 2.0, NAN], 1, True),
    ([0.0, 90.0, 1.0, 2.0, INF], 1, True),
    ([-INF, -INF, -INF, -INF, 5.0], 0, False),
    ([-3e38, 3e38, 0.0, 0.0, 3.4e38], 1, True),
]


@pytest.mark.parametrize("filters", [False, True])
def test_bad_logits_are_flagged_and_never_drawn(filters):
    logits = np.asarray([[*row, *[-INF] * (6 - len(row))] for row, *_ in BAD] * 2, np.float32)
    params = [SamplingParams(temperature=t, top_p=0.95 if filters else 1) for t in (0, 1) for _ in BAD]
    found = by_kernels(
        logits,
        state_of(params, 6, valid_vocab=4),
        positions_of(len(params)),
        SampleConfig(block_v=16),
        return_logprob=True,
    )
    assert found.tokens.tolist() == [token for _, token, _ in BAD] * 2
    assert found.ok.tolist() == [ok for *_, ok in BAD] * 2
    assert (np.asarray(found.logprob) <= 0).all()


@pytest.mark.parametrize("drawn", [False, True])
def test_no_id_at_all(drawn):
    state = state_of([SamplingParams(temperature=float(drawn), top_p=1)], 6, unused_ids=range(6))
    expected = sample(jnp.zeros((1, 6)), state, positions_of(1))
    found = by_kernels(np.zeros((1, 6), np.float32), state, positions_of(1), SampleConfig(block_v=16), has_random=drawn)
    assert (
        (found.tokens.tolist(), found.ok.tolist()) == (expected.tokens.tolist(), expected.ok.tolist()) == ([6], [False])
    )


# Thresholds.

FINITE = st.floats(-40, 40, width=32)
NEIGHBORS = st.sampled_from([1.0, float(np.nextafter(np.float32(1), np.float32(2))), 0.0, -0.0, -1.0, -INF])
SCORES = st.lists(st.one_of(FINITE, NEIGHBORS), min_size=2, max_size=64)


def ranks_of(scores):
    """uint32 in the order of the scores; both zeros are one."""
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, bits ^ np.uint32(0xFFFFFFFF), bits ^ np.uint32(0x80000000))


def searched(scores, params):
    """Which ids the searches leave of each row, and what they must leave where float32 can tell."""
    state = state_of(params, scores.shape[1], features=SamplerFeatures(filters=True))
    rows, vocabulary = rows_of(state, positions_of(len(params))), Vocabulary(scores.shape[1])
    counters = jnp.zeros(64, jnp.int32)
    thresholds, after = filter_thresholds(
        jnp.asarray(scores), rows, vocabulary, counters, SampleConfig(block_v=64, blocks_per_sum=2)
    )
    assert not np.any(after)
    first, second = (np.asarray(threshold)[:, None] for threshold in thresholds)
    (first_ref, _), _ = filter_thresholds(jnp.asarray(scores), rows, vocabulary, counters, implementation="reference")
    np.testing.assert_array_equal(np.asarray(first_ref)[rows.top_k > 0], first[rows.top_k > 0, 0])
    top_k, top_p, min_p = (np.asarray(x)[:, None] for x in (rows.top_k, rows.top_p, rows.min_p))
    gap, ranks = np.asarray(scaled_gaps_ref(jnp.asarray(scores), rows)), ranks_of(scores)
    with np.errstate(divide="ignore"):
        left = gap <= -np.log(min_p)
    above = (scores[:, None, :] > scores[:, :, None]).sum(axis=2)
    wanted = left & ((top_k == 0) | (above < top_k))
    weight = np.where(wanted, np.exp(-gap.astype(np.float64)), 0)
    mass = np.where(gap[:, None, :] < gap[:, :, None], weight[:, None, :], 0).sum(axis=2)
    enough = top_p * weight.sum(axis=1, keepdims=True)
    certain = (top_p >= 1) | (mass == 0) | (np.abs(mass - enough) > 1e-5 * weight.sum(axis=1, keepdims=True))
    wanted &= (top_p >= 1) | (mass < enough)
    # What the draw does with the edges: scores for top_k, gaps for top_p.
    left &= (top_k == 0) | (ranks >= first)
    edge = np.where(top_p >= 1, 0, np.where(top_k > 0, second, first))
    widest = np.where(ranks >= edge, gap, -INF).max(axis=1, keepdims=True)
    return left & ((edge == 0) | (gap <= widest)), wanted, certain


@settings(max_examples=12)
@given(
    scores=SCORES,
    top_k=st.integers(1, 70),
    top_p=st.floats(1e-3, 0.999),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_thresholds(scores, top_k, top_p, min_p, temperature):
    shared = {"min_p": min_p, "temperature": temperature}
    params = [
        SamplingParams(top_k=top_k, top_p=1, **shared),
        SamplingParams(top_p=top_p, **shared),
        SamplingParams(top_k=top_k, top_p=top_p, **shared),
    ]
    padded = np.full((3, 64), -INF, np.float32)
    padded[:, : len(scores)] = scores
    found, wanted, certain = searched(padded, params)
    np.testing.assert_array_equal(found[certain], wanted[certain])
    assert certain[0].all(), "counting is exact"


def test_thresholds_of_a_row_in_many_shares():
    """What programs leave is added up in runs, the last of them cut short."""
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(2, 300)) * 2).astype(np.float32)
    found, wanted, certain = searched(scores, [SamplingParams(top_k=77, top_p=0.8), SamplingParams(top_p=0.97)])
    assert certain.all()
    assert 10 < wanted.sum() < 400
    np.testing.assert_array_equal(found, wanted)


def test_the_order_of_the_filters():
    """As in the table of the sampler's own tests."""
    scores = np.log(np.asarray([[4, 3, 2, 1]] * 4, np.float64)).astype(np.float32)
    params = [
        SamplingParams(top_p=0.55, top_k=2),
        SamplingParams(top_p=0.55),
        SamplingParams(top_p=0.55, min_p=0.6),
        SamplingParams(top_p=1e-9),
    ]
    found, _, certain = searched(scores, params)
    assert certain.all()
    assert [set(np.flatnonzero(row).tolist()) for row in found] == [{0}, {0, 1}, {0}, {0}]


# The head.


def head_case(rng, rows, ids, inputs=64):
    """States and a head whose logits are whole numbers: the same in any order of addition, with many ties."""
    weight = rng.integers(-2, 3, (ids, inputs)).astype(np.float32)
    x = rng.integers(-1, 2, (rows, inputs)).astype(np.float32)
    return jnp.asarray(x), make_tiles(jnp.asarray(weight.view(np.uint32)), "float32")


def from_the_head(x, weight, state, positions, **options):
    vocabulary = Vocabulary(state.valid_vocab, state.unused_ids)
    rows, has_random = rows_of(state, positions), not state.features.greedy_only
    run = jax.jit(lambda x, c: lm_head_sample(x, weight, rows, vocabulary, c, has_random=has_random, **options))
    output, after = run(x, jnp.zeros(64, jnp.int32))
    assert not np.any(after), "counters must be left at zero"
    return output


PLAIN = [SamplingParams(temperature=t, top_p=1) for t in (0, 1, 0.4, 30)]


@pytest.mark.parametrize(
    ("rows", "ids", "block_n"),
    [(1, 97, 32), (3, 130, 64), pytest.param(18, 70, 32, marks=pytest.mark.soak), (4, 3, 64)],
)
def test_tokens_from_the_head(rows, ids, block_n):
    rng = np.random.default_rng(rows)
    x, weight = head_case(rng, rows, ids)
    unused = (0, 33) if ids > 40 else ()
    params = [PLAIN[i % 4 if rows > 1 else 1] for i in range(rows)]
    state, positions = state_of(params, ids, valid_vocab=ids - 1, unused_ids=unused), positions_of(rows)
    found = from_the_head(x, weight, state, positions, config=LinearConfig(block_m=16, block_n=block_n))
    expected = sample(x @ dequantize_tiles(weight).T, state, positions)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.ok.all()
    reference = from_the_head(x, weight, state, positions, implementation="reference")
    assert reference.tokens.tolist() == expected.tokens.tolist()


def test_greedy_takes_the_lowest_of_equals():
    x, weight = head_case(np.random.default_rng(0), 2, 200, inputs=4)
    logits = np.asarray(x @ dequantize_tiles(weight).T)
    assert ((logits == logits.max(axis=1, keepdims=True)).sum(axis=1) > 1).all()
    state = state_of([SamplingParams(temperature=0)] * 2, 200)
    assert from_the_head(x, weight, state, positions_of(2)).tokens.tolist() == logits.argmax(axis=1).tolist()


def test_more_blocks_than_are_looked_at_together():
    rng = np.random.default_rng(1)
    x, weight = head_case(rng, 18, 1100, inputs=8)
    state, positions = state_of([PLAIN[i % 4] for i in range(18)], 1100), positions_of(18)
    found = from_the_head(x, weight, state, positions, config=LinearConfig(block_m=32, block_n=32))
    assert found.tokens.tolist() == sample(x @ dequantize_tiles(weight).T, state, positions).tokens.tolist()


def test_a_row_alone_draws_the_same():
    rng = np.random.default_rng(2)
    x, weight = head_case(rng, 4, 150)
    state, positions = state_of(PLAIN, 150), positions_of(4)
    together = from_the_head(x, weight, state, positions).tokens.tolist()
    for i in range(4):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], state)
        assert from_the_head(x[i : i + 1], weight, one, positions[i : i + 1]).tokens.tolist() == together[i : i + 1]


@pytest.mark.parametrize("temperature", [0, 1])
def test_bad_logits_from_the_head(temperature):
    """A head that passes its inputs on: the very rows that the sampler is tested with."""
    rows = np.asarray([[*row, *[-INF] * (6 - len(row))] for row, *_ in BAD], np.float32)
    weight = np.zeros((6, 16), np.float32)
    weight[:, 0] = 1
    state = state_of([SamplingParams(temperature=temperature, top_p=1)], 6, valid_vocab=4)
    for row, (_, token, ok) in zip(rows, BAD, strict=True):
        # Nothing times infinity is NaN, so each row of logits is a column of the head.
        weight[:, 0] = row
        tiled = make_tiles(jnp.asarray(weight.view(np.uint32)), "float32")
        x = jnp.zeros((1, 16)).at[0, 0].set(1)
        found = from_the_head(x, tiled, state, positions_of(1))
        assert (found.tokens.tolist(), found.ok.tolist()) == ([token], [ok])


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16"])
def test_the_norm_is_part_of_the_head(kind):
    rng = np.random.default_rng(0)
    weight = jax.tree.map(lambda x: x[0], make_random_tiles(rng, (1, 100, 128), kind, 64 if kind == "int4" else 0))
    x, given = random_normal(rng, 2, 128), random_sum_sq(rng, 2, 3, first=1)
    state, positions = state_of([PLAIN[0], PLAIN[1]], 100), positions_of(2)
    found = from_the_head(x, weight, state, positions, sum_sq=given, eps=1e-5)
    logits = x * inv_rms_ref(given, 128, 1e-5) @ dequantize_tiles(weight).T
    assert found.tokens.tolist() == sample(logits, state, positions).tokens.tolist()
    reference = from_the_head(x, weight, state, positions, sum_sq=given, eps=1e-5, implementation="reference")
    assert reference.tokens.tolist() == found.tokens.tolist()


# The sampler as decode steps call it.

EVERYTHING = [
    SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={5: 3.0}, logprobs=3),
    SamplingParams(temperature=0.6, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=-0.3),
    SamplingParams(top_p=1, logit_bias={3: 4.0, 17: -100.0}),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.7, min_p=0.02),
]


@pytest.mark.parametrize(
    "params",
    [
        EVERYTHING,
        [SamplingParams(temperature=0, presence_penalty=1.0, logprobs=0)] * 2,
        [SamplingParams(top_p=1, logprobs=2)],
        [SamplingParams(temperature=0)],
        [SamplingParams(temperature=0.9, top_p=1), SamplingParams(temperature=0)],
    ],
    ids=["everything", "penalties", "logprobs", "greedy", "temperature"],
)
def test_every_option(params):
    rng = np.random.default_rng(len(params))
    rows, ids, eps = len(params), 150, 1e-5
    weight = jax.tree.map(lambda x: x[0], make_random_tiles(rng, (1, ids, 64), "int8"))
    parts, counters = random_sum_sq(rng, rows, 2).partials, jnp.zeros(64, jnp.int32)
    states: Any = ResidualStream(random_normal(rng, rows, 64), 4 * random_normal(rng, rows, 64), parts, None, counters)
    state = state_of(params, ids, valid_vocab=ids - 3, unused_ids=(9,))
    state = update_state(state, jnp.full(rows, 7, jnp.int32), jnp.ones(rows, bool))
    factor = jax.lax.rsqrt(states.sum_sq.sum(axis=1, keepdims=True) / 64 + eps)
    logits = jnp.matmul(states.norm_scaled * factor, dequantize_tiles(weight).T, precision=jax.lax.Precision.HIGHEST)
    expected = sample(logits, state, positions_of(rows))
    found = jax.jit(lambda s: sample_from_residual(s, weight, state, positions_of(rows) - 1, eps=eps))(states)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name in ("tokens", "ok", "top_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("logprob", "top_logprobs"):
        if getattr(expected, name) is not None:
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5, err_msg=name)
