"""The sampler's kernels on a GPU give the tokens of the sampler in plain JAX, for all parameters, every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.sampling import SamplerFeatures, SamplerState, SamplingParams, sample
from pallas_kernels import is_interpreted, random_arrays
from pallas_kernels.sample import SamplingTensors, Vocabulary, lm_head_sample, sample_logits
from pallas_kernels.tiles import dequantize_tiles

pytestmark = pytest.mark.gpu
WIDTH, TIMES = (300, 2) if is_interpreted() else (154_880, 50)
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(top_p=1),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.7, min_p=0.02),
    SamplingParams(temperature=2, top_k=3, top_p=1),
    SamplingParams(top_p=0.2, min_p=0.3),
    SamplingParams(temperature=0.7, top_p=0.99),
]


def make_state(count, *, filters):
    """Returns the state and positions of rows; without filters they have only temperatures."""
    params = [PARAMS[i % len(PARAMS)] for i in range(count)]
    if not filters:
        params = [SamplingParams(temperature=row.temperature, top_p=1) for row in params]
    features = SamplerFeatures(filters=filters, logprobs=0 if filters else None)
    state = SamplerState.create(
        params, [2**33 * i + i for i in range(count)], [()] * count, vocab_size=WIDTH, valid_vocab=WIDTH - 24,
        features=features,
    )  # fmt: skip
    return state, 3 + 1000 * jnp.arange(count, dtype=jnp.int32)


def rows_of(state, positions):
    names = ("temperature", "top_k", "top_p", "min_p", "seeds")
    return SamplingTensors(**{name: getattr(state, name) for name in names}, positions=positions - 1)


def same_every_time(run, counters):
    """Returns the output of all runs, which must be identical; the counters must be zero after each."""
    results = [run(counters) for _ in range(TIMES)]
    for _, after in results:
        assert not np.any(after)
    for output, _ in results[1:]:
        for first, other in zip(*map(jax.tree.leaves, (results[0][0], output)), strict=True):
            np.testing.assert_array_equal(first, other)
    return results[0][0]


@pytest.mark.parametrize("rows", [1, 6, 17])
def test_filters(rows):
    state, positions = make_state(rows, filters=True)
    logits = random_arrays.random_normal((rows, WIDTH), 7, std=4.0)
    expected = sample(logits, state, positions)
    vocabulary = Vocabulary(state.valid_vocab, state.unused_ids)
    run = jax.jit(
        lambda c: sample_logits(
            logits, rows_of(state, positions), vocabulary, c, has_random=True, has_filters=True, return_logprob=True
        )
    )
    actual = same_every_time(run, jnp.zeros(64, jnp.int32))
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.ok, expected.ok)
    np.testing.assert_allclose(actual.logprob, expected.logprob, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 17])
def test_the_head_samples_from_its_logits(rows):
    """Each token has the highest key of its row, up to the rounding of logits that the kernel never writes."""
    state, positions = make_state(rows, filters=False)
    dtype, inputs = ("float32", 64) if is_interpreted() else ("bfloat16", 2048)
    x, weight = (
        random_arrays.random_normal((rows, inputs), 1, dtype),
        random_arrays.random_tiles((WIDTH, inputs), "int8", seed=2),
    )
    vocabulary = Vocabulary(state.valid_vocab, state.unused_ids)
    run = jax.jit(lambda c: lm_head_sample(x, weight, rows_of(state, positions), vocabulary, c, has_random=True))
    actual = same_every_time(run, jnp.zeros(64, jnp.int32))
    assert actual.ok.all()
    logits = jnp.matmul(x.astype(jnp.float32), dequantize_tiles(weight).T, precision="highest")
    near = logits.at[jnp.arange(rows), actual.tokens].add(2.0**-7 * jnp.abs(logits).max())
    np.testing.assert_array_equal(sample(near, state, positions).tokens, actual.tokens)
