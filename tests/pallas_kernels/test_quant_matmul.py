"""Products of few rows, in every storage, with the operations that are fused with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LaunchError
from pallas_kernels._interpreter import restrict_programs
from pallas_kernels.quant_matmul import fused_linear
from pallas_kernels.quant_matmul.config import LinearConfig, linear_heuristic
from pallas_kernels.tiles import BITS_PER_QVALUE
from tests.pallas_kernels.builders import assert_close, make_random_tiles, random_normal, random_sum_sq
from tests.pallas_kernels.references import fused_linear_ref

pytestmark = pytest.mark.kernels
GROUPS = {"int4": 64, "uint4": 32, "fp4": 32, "int8": 0, "uint8": 16, "fp8": 128}
ONE = jnp.ones(1, jnp.int32)


def run_both(x, weight, layer_index=ONE, config=None, **options):
    """Results of the kernel and of the reference."""
    counters = jnp.zeros(256, jnp.int32)
    actual, after = jax.jit(
        lambda x, c: fused_linear(x, weight, layer_index, c, config=config, implementation="triton", **options)
    )(x, counters)
    assert not np.any(after), "counters must be left at zero"
    expected, _ = fused_linear(x, weight, layer_index, counters, implementation="reference", **options)
    return actual, expected


def assert_same_output(actual, expected):
    assert_close(actual.out, expected.out)
    assert_close(jnp.sum(actual.sum_sq.partials, axis=1), expected.sum_sq.partials[:, 0])
    assert_close(actual.scaled, expected.scaled)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.soak), 3])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [pytest.param(1, 96, 256, marks=pytest.mark.soak), (5, 130, 384), (17, 64, 128)]
)
@pytest.mark.parametrize("kind", BITS_PER_QVALUE)
def test_every_storage(kind, rows, outputs, inputs, splits):
    rng = np.random.default_rng([rows, splits])
    group = GROUPS.get(kind, 0)
    weight = make_random_tiles(rng, (2, outputs, inputs), kind, group if group <= inputs else 0)
    config = LinearConfig(block_n=32, splits=splits)
    actual, expected = run_both(
        random_normal(rng, rows, inputs),
        weight,
        config=config,
        sum_sq=random_sum_sq(rng, rows, 3, first=2),
        eps=1e-5,
        residual=random_normal(rng, rows, outputs),
        next_norm=random_normal(rng, 4, outputs),
        next_norm_offset=2,
    )
    assert_same_output(actual, expected)


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("inputs", [80, 192])
def test_inputs_that_fill_no_chunk(kind, inputs):
    rng = np.random.default_rng(0)
    weight = make_random_tiles(rng, (2, 70, inputs), kind, 16 if kind == "int4" else 0)
    assert_same_output(*run_both(random_normal(rng, 3, inputs), weight, config=LinearConfig(block_n=64)))


def test_a_part_of_wider_rows():
    rng = np.random.default_rng(0)
    assert_same_output(*run_both(random_normal(rng, 3, 200), make_random_tiles(rng, (2, 64, 128), "int8")))


@pytest.mark.parametrize("kinds", [(64, 64), (64, 0)])
def test_two_matrices_side_by_side(kinds):
    rng = np.random.default_rng(0)
    first, second = (
        make_random_tiles(rng, (2, n, 256), "int4", group) for n, group in zip((128, 96), kinds, strict=True)
    )
    x, norms = random_normal(rng, 2, 256), random_normal(rng, 2, 224)
    options = {"sum_sq": random_sum_sq(rng, 2, 3), "eps": 1e-6}
    counters = jnp.zeros(64, jnp.int32)
    (left, _), (right, _) = (fused_linear_ref(x, w, ONE, counters, **options) for w in (first, second))
    expected = jnp.concatenate([left.out, right.out], axis=1)
    both, _ = fused_linear_ref(x, first, ONE, counters, second_weight=second, **options)
    assert_close(both.out, expected)
    for config in (LinearConfig(block_n=32), LinearConfig(block_n=32, splits=2)):
        actual, _ = fused_linear(
            x, first, ONE, counters, second_weight=second, next_norm=norms, config=config, **options
        )
        assert_close(actual.out, expected)
        assert_close(actual.scaled, expected * norms[1:2])
        # Sums of squares by blocks of columns, of which a reader uses some.
        assert_close(actual.sum_sq.partials, jnp.sum((expected**2).reshape(2, -1, 32), axis=-1))


@pytest.mark.parametrize("rows", [16, 33, 64])
def test_many_rows(rows):
    rng = np.random.default_rng(rows)
    weight = make_random_tiles(rng, (1, 128, 256), "int4", 64)
    assert_same_output(
        *run_both(
            random_normal(rng, rows, 256), weight, jnp.zeros(1, jnp.int32), residual=random_normal(rng, rows, 128)
        )
    )


@pytest.mark.parametrize("program", ["first", "last"])
def test_the_real_output_projection(program):
    """5,120 inputs in full, the outputs cut to two tiles."""
    rng = np.random.default_rng(0)
    weight = make_random_tiles(rng, (1, 128 if program == "first" else 64, 5120), "int4", 64)
    config = linear_heuristic(1, 2048, weight.num_chunks, 142)
    assert_same_output(*run_both(random_normal(rng, 1, 5120), weight, jnp.zeros(1, jnp.int32), config))


def test_results_do_not_depend_on_the_order_of_programs():
    """The program that finishes a block last adds the splits, always in one order."""
    rng = np.random.default_rng(0)
    weight, x = make_random_tiles(rng, (1, 128, 512), "int8"), random_normal(rng, 2, 512)
    config, counters = LinearConfig(splits=4), jnp.zeros(64, jnp.int32)
    programs, results = [(0, split, block) for split in range(4) for block in range(2)], []
    for _ in range(4):
        with restrict_programs([programs[i] for i in rng.permutation(len(programs))]):
            result, after = fused_linear(x, weight, jnp.zeros(1, jnp.int32), counters, config=config)
        assert not np.any(after)
        results.append(result)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].out, other.out)
        np.testing.assert_array_equal(results[0].sum_sq.partials, other.sum_sq.partials)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 100}, "rows of 100 columns for a matrix of 128 inputs"),
        ({"splits": 2}, "2 blocks cannot be counted by 1 counters"),
    ],
)
def test_shapes_that_do_not_match_are_refused(change, message):
    rng = np.random.default_rng(0)
    x, weight = random_normal(rng, 2, change.get("x", 128)), make_random_tiles(rng, (1, 96, 128), "int8")
    zero, config = jnp.zeros(1, jnp.int32), LinearConfig(splits=change.get("splits", 1))
    with pytest.raises(LaunchError, match=message):
        fused_linear(x, weight, zero, zero, config=config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int8", "a second matrix cannot begin at output 96 with blocks of 64"),
        ("fp8", "two matrices side by side must have codes of one kind"),
    ],
)
def test_a_second_weight_that_the_kernel_cannot_take(kind, message):
    """By name this is an error; by default the reference runs."""
    rng = np.random.default_rng(0)
    first, second = make_random_tiles(rng, (2, 96, 128), "int8"), make_random_tiles(rng, (2, 64, 128), kind)
    x, counters, config = random_normal(rng, 2, 128), jnp.zeros(64, jnp.int32), LinearConfig()
    with pytest.raises(NotImplementedError, match=message):
        fused_linear(x, first, ONE, counters, second_weight=second, config=config, implementation="triton")
    actual, _ = fused_linear(x, first, ONE, counters, second_weight=second, config=config)
    parts = [fused_linear_ref(x, weight, ONE, counters)[0].out for weight in (first, second)]
    assert_close(actual.out, jnp.concatenate(parts, axis=1))


def test_inside_a_loop_the_layer_is_data():
    rng = np.random.default_rng(0)
    weight, x = make_random_tiles(rng, (3, 64, 128), "int8"), random_normal(rng, 2, 128)

    def step(carry, layer):
        result, counters = fused_linear(x, weight, layer[None], carry, dtype=jnp.float32)
        return counters, result.out

    _, actual = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(3, dtype=jnp.int32)))(jnp.zeros(64, jnp.int32))
    for layer in range(3):
        expected, _ = fused_linear_ref(x, weight, jnp.full(1, layer), jnp.zeros(1, jnp.int32))
        assert_close(actual[layer], expected.out)


def test_there_is_no_derivative():
    rng = np.random.default_rng(0)
    weight, x = make_random_tiles(rng, (1, 64, 128), "float32"), random_normal(rng, 2, 128)

    def loss(x):
        return fused_linear(x, weight, jnp.zeros(1, jnp.int32), jnp.zeros(64, jnp.int32))[0].out.sum()

    with pytest.raises(Exception, match="load the model with kernels='reference'"):
        jax.grad(loss)(x)


class TestHeuristic:
    """Block sizes without a tuned entry."""

    @pytest.mark.parametrize("multiprocessors", [132, 142, 148, 188])
    @pytest.mark.parametrize(
        ("outputs", "inputs"), [(1344, 2048), (2048, 5120), (10240, 2048), (64, 2048), (154880, 2048)]
    )
    @pytest.mark.parametrize("rows", [1, 16, 17, 64])
    def test_it_is_possible(self, rows, outputs, inputs, multiprocessors):
        chunks = inputs // 64
        config = linear_heuristic(rows, outputs, chunks, multiprocessors)
        assert config.block_n in (32, 64)
        assert config.block_m >= 16
        assert 1 <= config.splits <= chunks
        chunks_per_split = -(-chunks // config.splits)
        assert chunks_per_split * (config.splits - 1) < chunks, "a split is empty"
