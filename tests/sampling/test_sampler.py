"""The sampler: distribution, independence of the batch, greedy rows, log-probabilities, invalid logits."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax

from glm_jax.sampling import SamplerFeatures, SamplerState, SamplingParams, is_stop, sample, update_state
from glm_jax.sampling.gumbel import gumbel_noise, threefry2x32
from glm_jax.sampling.numerics import deterministic_sum, search_threshold, token_ids_like
from tests.sampling import numpy_reference

INF, NAN = float("inf"), float("nan")
# A correct sampler fails one such test in a million. Seeds are fixed, so each test passes always or never.
RARE = 1e-6
jitted_sample = jax.jit(sample)


def make_state(params, width, *, seeds=None, prompts=None, valid_vocab=None, **options):
    return SamplerState.create(
        params,
        seeds or list(range(len(params))),
        prompts or [(1, 2)] * len(params),
        vocab_size=width,
        valid_vocab=valid_vocab or width,
        **options,
    )


def int32_array(*values):
    return jnp.asarray(values, jnp.int32)


def tokens_at(params, logits, seeds, positions):
    """The token that one row with these logits gets for each pair of seed and position."""
    count = len(positions)
    state = make_state([params] * count, len(logits), seeds=seeds)
    grid = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits)))
    return np.asarray(jitted_sample(grid, state, np.asarray(positions, np.int32)).tokens)


def assert_frequencies(tokens, probabilities):
    expected = np.asarray(probabilities) * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    assert expected[possible].min() >= 5, "too few samples for the chi-square distribution to apply"
    assert scipy.stats.chisquare(observed[possible], expected[possible]).pvalue > RARE


LOGITS = np.asarray([2.0, 1.0, 0.0, 0.0, -1.0, 3.0, -2.0, 0.5], np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1},
        {"top_p": 1, "temperature": 0.7},
        {"top_p": 1, "temperature": 3},
        {"top_p": 1, "top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.9, "top_k": 6, "min_p": 0.05, "temperature": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_samples_have_the_right_distribution(options, vary):
    count = 20_000
    params = SamplingParams(**options)
    counter = list(range(count))
    constant = [7] * count
    seeds, positions = (constant, counter) if vary == "position" else (counter, constant)
    keep, certain = numpy_reference.kept_tokens(LOGITS.astype(np.float64), params)
    assert certain.all()
    expected = numpy_reference.probabilities(np.where(keep, LOGITS.astype(np.float64), -INF) / params.temperature)
    assert_frequencies(tokens_at(params, LOGITS, seeds, positions), expected)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (2**32, 0), (1, 1)], ids=["position", "seed", "high half", "both"])
def test_neighboring_samples_are_independent(step):
    count = 20_000
    params = SamplingParams(top_p=1)
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    seeds = [10 * i for i in range(count)]
    first = tokens_at(params, logits, seeds, [1000] * count)
    second = tokens_at(params, logits, [s + step[0] for s in seeds], [1000 + step[1]] * count)
    assert_frequencies(first * 4 + second, np.outer([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]).ravel())


def test_equal_tokens_of_a_wide_row_are_equally_likely():
    count, width = 2_000, 10_007
    tokens = tokens_at(SamplingParams(top_p=1), np.zeros(width), list(range(count)), [3] * count)
    # Low ids would be favored if the noise had too few values to tell ten thousand tokens apart.
    assert scipy.stats.kstest((tokens + 0.5) / width, "uniform").pvalue > RARE


def test_noise_has_the_gumbel_distribution():
    make = jax.jit(lambda seeds, positions: gumbel_noise(seeds, positions, token_ids_like(jnp.zeros((4, 25_000)))))
    noise = np.asarray(make(np.zeros((4, 2), np.uint32), np.arange(4, dtype=np.int32)))
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(noise.ravel(), "gumbel_r").pvalue > RARE


def test_noise_of_the_extreme_bits_is_finite(monkeypatch):
    extremes = jnp.asarray([[0, 1, 2**31, 2**32 - 2**7, 2**32 - 1]], jnp.uint32)
    monkeypatch.setattr("glm_jax.sampling.gumbel.threefry2x32", lambda key, counter: (extremes, extremes))
    noise = np.asarray(gumbel_noise(jnp.zeros((1, 2), jnp.uint32), int32_array(0), token_ids_like(np.zeros((1, 5)))))
    assert -2.9 < noise.min() < noise.max() < 22.9
    assert np.all(np.diff(noise[0]) <= 0)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Known-answer vectors of Random123 (kat_vectors, threefry2x32 20).
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(key, counter, expected):
    as_arrays = [tuple(jnp.uint32(word) for word in pair) for pair in (key, counter)]
    assert tuple(int(word) for word in jax.jit(threefry2x32)(*as_arrays)) == expected


def test_tokens_of_a_seed_never_change():
    """Users rely on the tokens of a seed; changing them requires a new major version."""
    tokens = tokens_at(SamplingParams(top_p=1), np.zeros(1000), [0, 1, 2**40, 2**63 - 1], [0, 5, 7, 131_071])
    assert tokens.tolist() == [835, 536, 690, 818]


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.7, min_p=0.02),
    SamplingParams(temperature=0.6, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=-0.3),
    SamplingParams(top_p=1, logit_bias={3: 4.0, 17: -100.0}),
    SamplingParams(temperature=2.0, top_k=3, top_p=1),
    SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={5: 3.0}),
    SamplingParams(top_p=0.2, min_p=0.3),
]
ALL = SamplerFeatures(penalties=True, filters=True, bias=True, logprobs=4)
WIDE = 1012  # a multiple of the mesh axes, but not of a SIMD vector


def walk(params, seeds, logits, starts, steps=4, **options):
    """Results of a few steps, each with other logits; arrays ``[steps, B, ...]``."""
    state = make_state(params, WIDE, seeds=seeds, **options)
    results = []
    for step in range(steps):
        result = jitted_sample(np.roll(logits, step, axis=1), state, np.asarray(starts, np.int32) + np.int32(step))
        state = jax.jit(update_state)(state, result.tokens, np.ones(len(params), bool))
        results.append(result)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


@pytest.fixture(scope="module")
def batch():
    """Eight rows with different options, and their results as one batch."""
    logits = (np.random.default_rng(3).normal(size=(8, WIDE)) * 3).astype(np.float32)
    seeds, starts = [11 * i for i in range(8)], [5, 0, 77, 4096, 2, 9, 1, 131_000]
    return logits, seeds, starts, walk(MIXED, seeds, logits, starts, features=ALL)


@pytest.mark.parametrize("order", [*((i,) for i in range(8)), (4, 2, 7), (7, 6, 5, 4, 3, 2, 1, 0), (3, 3, 3)], ids=str)
def test_a_row_does_not_depend_on_the_other_rows(batch, order):
    logits, seeds, starts, as_one_batch = batch
    pick = list(order)
    alone = walk(
        [MIXED[i] for i in pick], [seeds[i] for i in pick], logits[pick], [starts[i] for i in pick], features=ALL
    )
    for name in ("tokens", "logprob", "top_ids", "top_logprobs", "ok"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(as_one_batch, name)[:, pick], err_msg=name)


@pytest.mark.parametrize("row", [0, 1, 3, 4], ids=["greedy", "filters", "penalties", "bias"])
def test_the_smallest_features_give_the_same_tokens(batch, row):
    logits, seeds, starts, as_one_batch = batch
    least = walk([MIXED[row]], [seeds[row]], logits[row : row + 1], starts[row : row + 1])
    np.testing.assert_array_equal(least.tokens, as_one_batch.tokens[:, row : row + 1])
    assert least.logprob is None
    assert least.top_ids is None


def test_same_without_jit():
    state = make_state([SamplingParams(temperature=0.7, top_p=0.9)], 8)
    logits = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32) * 3
    for position in range(4):
        eager = sample(jnp.asarray(logits), state, int32_array(position))
        np.testing.assert_array_equal(eager.tokens, jitted_sample(logits, state, int32_array(position)).tokens)


def test_other_seeds_and_positions_give_other_tokens(batch):
    logits, seeds, starts, _ = batch
    steps = 32
    same = walk(MIXED, seeds, logits, starts, steps=steps, features=ALL).tokens
    for other in (
        walk(MIXED, [seed + 1 for seed in seeds], logits, starts, steps=steps, features=ALL).tokens,
        walk(MIXED, seeds, logits, [start + 1 for start in starts], steps=steps, features=ALL).tokens,
    ):
        changed = (other != same).any(axis=0)
        assert changed.tolist()[:7] == [False, True, True, True, True, True, False]  # the first and last are greedy


@pytest.mark.parametrize(("logits_axes", "row_axis"), [(("data", "model"), "data"), (("data", None), None)], ids=str)
def test_sharded_rows_give_the_same(batch, logits_axes, row_axis):
    logits, seeds, starts, as_one_batch = batch
    expected = jax.tree.map(lambda leaf: leaf[0], as_one_batch)
    state, positions = make_state(MIXED, WIDE, seeds=seeds, features=ALL), int32_array(*starts)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def put(tree, *axes):
        return jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*axes)))

    with jax.set_mesh(mesh):
        rows = put(state, row_axis)
        result = jitted_sample(put(logits, *logits_axes), rows, put(positions, row_axis))
        updated = jax.jit(update_state)(rows, result.tokens, put(np.ones(8, bool), row_axis))
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    assert result.tokens.sharding.spec == jax.P(logits_axes[0])
    np.testing.assert_array_equal(np.asarray(updated.counts)[np.arange(8), expected.tokens], 1)


def test_greedy_takes_the_lowest_of_equals():
    logits = np.asarray([[1, 3, 3, 2], [-0.0, 0.0, -1, 0], [-INF, -INF, -5, -5], [2, INF, INF, 1]], np.float32)
    assert jitted_sample(
        logits, make_state([SamplingParams(temperature=0)] * 4, 4), int32_array(0, 1, 2, 3)
    ).tokens.tolist() == [
        1,
        0,
        2,
        1,
    ]
    mixed = make_state([SamplingParams(temperature=0)] * 4, 4, features=ALL)
    assert jitted_sample(logits, mixed, int32_array(0, 1, 2, 3)).tokens.tolist() == [1, 0, 2, 1]


def test_greedy_compares_scores_and_not_rounded_gaps():
    logits = np.asarray([[1e-3, np.nextafter(np.float32(1e-3), np.float32(1)), -1e30]], np.float32)
    state = make_state([SamplingParams(temperature=0)], 3, features=ALL)
    assert jitted_sample(logits, state, int32_array(0)).tokens.tolist() == [1]


def test_small_temperatures_are_greedy_in_effect():
    logits = np.asarray([0.0, 0.001, -1.0])
    assert set(tokens_at(SamplingParams(temperature=1e-5), logits, list(range(200)), [0] * 200).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "token", "ok"),
    [
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
    ],
    ids=str,
)
def test_invalid_logits_are_flagged_and_never_sampled(temperature, row, token, ok):
    logits = np.asarray([[*row, *[-INF] * (6 - len(row))]], np.float32)
    features = SamplerFeatures(filters=True, logprobs=3)
    state = make_state([SamplingParams(temperature=temperature)], 6, valid_vocab=4, features=features)
    result = jitted_sample(logits, state, int32_array(0))
    assert (result.tokens.tolist(), result.ok.tolist()) == ([token], [ok])
    assert result.logprob[0] <= 0
    assert (result.top_logprobs <= 0).all()


def test_an_invalid_row_does_not_affect_the_others(batch):
    logits, seeds, starts, as_one_batch = batch
    invalid = logits.copy()
    invalid[2] = NAN
    result = jitted_sample(invalid, make_state(MIXED, WIDE, seeds=seeds, features=ALL), np.asarray(starts, np.int32))
    others = [0, 1, 3, 4, 5, 6, 7]
    assert result.ok.tolist() == [i != 2 for i in range(8)]
    np.testing.assert_array_equal(result.tokens[np.asarray(others)], as_one_batch.tokens[0, others])


@pytest.mark.parametrize("count", [0, 20])
def test_logprobs_are_of_the_raw_distribution(count):
    rng = np.random.default_rng(count)
    logits = (rng.normal(size=(3, 300)) * 5).round(1).astype(np.float32)  # rounded: ties
    params = SamplingParams(temperature=0, presence_penalty=1, logit_bias={7: 5.0}, logprobs=count)
    result = jitted_sample(logits, make_state([params] * 3, 300, valid_vocab=280), int32_array(1, 2, 3))
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.logprob, exact[np.arange(3), result.tokens], rtol=2e-6, atol=2e-6)
    order = np.argsort(-exact[:, :280], axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(result.top_ids, order)
    np.testing.assert_allclose(result.top_logprobs, np.take_along_axis(exact, order, -1), rtol=2e-6, atol=2e-6)


def test_logprobs_are_padded_when_ids_run_out():
    logits = np.asarray([[1.0, -INF, 2.0, -INF, 9.0]], np.float32)
    state = make_state([SamplingParams(temperature=0, logprobs=6)], 5, valid_vocab=4)
    result = jitted_sample(logits, state, int32_array(0))
    assert result.top_ids.tolist() == [[2, 0, 1, 3, -1, -1]]
    assert np.isneginf(result.top_logprobs[0, 2:]).all()


def test_update_counts_active_rows_only():
    params = SamplingParams(frequency_penalty=1)
    state = make_state([params] * 3, 5, prompts=[(1,), (2, 2), ()])
    for tokens, active in [([1, 2, 3], [True, False, True]), ([1, 0, 4], [True, True, True])]:
        state = update_state(state, int32_array(*tokens), jnp.asarray(active))
    assert state.counts.tolist() == [[0, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert state.in_prompt.tolist() == [[i in p for i in range(5)] for p in ((1,), (2,), ())]
    plain = make_state([SamplingParams()], 5)
    assert update_state(plain, int32_array(1), jnp.asarray([True])) is plain


def test_a_row_moves_into_a_slot():
    whole, parts = (make_state(p, 16, seeds=list(range(len(p))), features=ALL) for p in (MIXED[2:4], MIXED[3:4]))
    moved = jax.tree.map(
        lambda slots, row: slots.at[1].set(row[0]), make_state(MIXED[2:4][::-1], 16, features=ALL), parts
    )
    moved = jax.tree.map(lambda slots, row: slots.at[0].set(row[0]), moved, jax.tree.map(lambda x: x[:1], whole))
    jax.tree.map(np.testing.assert_array_equal, moved, dataclasses.replace(whole, seeds=moved.seeds))
    assert moved.seeds.tolist() == [[0, 0], [0, 0]]


def test_stop_ids():
    rows = [
        SamplingParams(),
        SamplingParams(stop_token_ids=(4,)),
        SamplingParams(ignore_eos=True),
        SamplingParams(ignore_eos=True, stop_token_ids=tuple(range(10, 20))),
    ]
    state = make_state(rows, 32, eos_ids=(2, 3))
    assert state.stop_ids.shape == (4, 16)
    for token, expected in {
        2: [True, True, False, False],
        3: [True, True, False, False],
        4: [False, True, False, False],
        19: [False, False, False, True],
        0: [False] * 4,
    }.items():
        assert is_stop(jnp.full(4, token, jnp.int32), state).tolist() == expected


def test_a_loop_on_the_device_equals_single_steps():
    """Generation in one jit: sample, update the state, check for stop ids."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(32, 32)).astype(np.float32) * 2)
    params = [SamplingParams(temperature=t, top_p=1, repetition_penalty=1.1) for t in (0.0, 0.8, 1.5)]
    start = make_state(params, 32, prompts=[(1,), (2,), (3,)], eos_ids=(0, 5))
    first, steps = int32_array(1, 2, 3), 12

    def step(carry, _):
        state, last, position, done = carry
        result = sample(table[last], state, position)
        state = update_state(state, result.tokens, ~done)
        return (state, result.tokens, position + 1, done | is_stop(result.tokens, state)), (result.tokens, done)

    carry = (start, first, first, jnp.zeros(3, bool))
    final, (looped, dones) = jax.jit(lambda carry: lax.scan(step, carry, length=steps))(carry)
    single = jax.jit(step)
    for i in range(steps):
        carry, (tokens, done) = single(carry, None)
        assert tokens.tolist() == looped[i].tolist()
        assert done.tolist() == dones[i].tolist()
    assert final[0].counts.tolist() == carry[0].counts.tolist()
    assert final[0].counts.sum() == (~dones).sum()


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from primitives(inner)
            elif hasattr(inner, "jaxpr"):
                yield from primitives(inner.jaxpr)


def test_nothing_is_sorted():
    state = make_state(MIXED, WIDE, features=dataclasses.replace(ALL, logprobs=20))
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((8, WIDE), jnp.float32), state, jnp.zeros(8, jnp.int32))
    used = set(primitives(jaxpr.jaxpr))
    assert {"reduce_max", "cond", "log1p"} <= used  # inner jaxprs were visited
    assert not {name for name in used if "sort" in name or "top_k" in name}


def test_options_do_not_recompile():
    count = 0

    def counted(logits, state, positions):
        nonlocal count
        count += 1
        return sample(logits, state, positions)

    jitted = jax.jit(counted)
    for params, seed in itertools.product(
        [SamplingParams(), SamplingParams(top_k=5, top_p=0.3, temperature=2)], (1, 2)
    ):
        jitted(np.zeros((1, 16), np.float32), make_state([params], 16, seeds=[seed]), int32_array(seed))
    assert count == 1


@pytest.mark.parametrize(
    "logits", [np.zeros((1, 4), np.float16), np.zeros(4, np.float32), np.zeros((1, 4), np.int32)], ids=str
)
def test_only_a_float32_matrix_is_sampled(logits):
    with pytest.raises(ValueError, match=r"sampling needs float32 logits \[B, V\], got "):
        sample(jnp.asarray(logits), make_state([SamplingParams()], 4), int32_array(0))


def tree_sum(values):
    """The order of additions of ``deterministic_sum``, in NumPy."""
    while (width := values.shape[-1]) > 1:
        fan_in = min(32, width)
        chunk = -(-width // fan_in)
        padded = np.concatenate([values, np.zeros((len(values), chunk * fan_in - width), np.float32)], axis=1)
        terms = np.split(padded, fan_in, axis=1)
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
        (values,) = terms
    return values[:, 0]


@pytest.mark.parametrize("width", [1, 2, 31, 33, 1000, 1025, 33_000])
def test_sums_are_added_in_the_documented_order(width):
    values = np.random.default_rng(width).random((3, width), np.float32) ** 8
    total = np.asarray(jax.jit(deterministic_sum)(values))
    np.testing.assert_array_equal(total, tree_sum(values))
    np.testing.assert_allclose(total, values.astype(np.float64).sum(-1), rtol=2e-6)
    np.testing.assert_array_equal(jax.jit(deterministic_sum)(values[1:2]), total[1:2])


TINY = np.finfo(np.float32).tiny


@pytest.mark.parametrize(
    "edge",
    [-INF, -3.4e38, -1.5, -TINY, 0.0, TINY, 0.1, np.nextafter(np.float32(1), np.float32(2)), 3.4e38, INF],
    ids=str,
)
def test_threshold_search_is_exact(edge):
    edge = np.float32(edge)
    threshold = np.asarray(jax.jit(lambda like: search_threshold(lambda x: x >= edge, like))(np.zeros(3, np.float32)))
    if edge == 0:  # a CPU treats subnormal numbers as 0
        threshold = np.where(np.abs(threshold) < TINY, 0, threshold)
    np.testing.assert_array_equal(threshold, np.full(3, edge))
