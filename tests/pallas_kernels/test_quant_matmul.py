"""Products of few rows, in every storage, with all that goes before and after them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LaunchError
from pallas_kernels._interpreter import restrict_programs
from pallas_kernels.quant_matmul import fused_linear
from pallas_kernels.quant_matmul.config import LinearConfig, linear_heuristic
from pallas_kernels.quant_matmul.reference import fused_linear_ref
from pallas_kernels.tiles import BITS_PER_QVALUE
from tests.pallas_kernels.builders import assert_close, make_random_tiles, random_normal, random_sum_sq

pytestmark = pytest.mark.kernels
GROUPS = {"int4": 64, "uint4": 32, "fp4": 32, "int8": 0, "uint8": 16, "fp8": 128}
ONE = jnp.ones(1, jnp.int32)


def both(x, weight, place=ONE, shape=None, **options):
    counters = jnp.zeros(256, jnp.int32)
    found, after = jax.jit(lambda x, c: fused_linear(x, weight, place, c, config=shape, **options))(x, counters)
    assert not np.any(after), "counters must be left at zero"
    options.pop("other", None)
    return found, fused_linear_ref(x, weight, place, **options)


def agree(found, expected):
    assert_close(found.out, expected.out)
    assert_close(jnp.sum(found.squares.parts, axis=1), expected.squares.parts[:, 0])
    assert_close(found.scaled, expected.scaled)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.soak), 3])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [pytest.param(1, 96, 256, marks=pytest.mark.soak), (5, 130, 384), (17, 64, 128)]
)
@pytest.mark.parametrize("kind", BITS_PER_QVALUE)
def test_every_storage(kind, rows, outputs, inputs, splits):
    rng = np.random.default_rng([rows, splits])
    group = GROUPS.get(kind, 0)
    weight = make_random_tiles(rng, (2, outputs, inputs), kind, group if group <= inputs else 0)
    shape = LinearConfig(block_n=32, splits=splits)
    found, expected = both(
        random_normal(rng, rows, inputs),
        weight,
        shape=shape,
        squares=random_sum_sq(rng, rows, 3, first=2),
        eps=1e-5,
        residual=random_normal(rng, rows, outputs),
        next_norm=random_normal(rng, 4, outputs),
        next_from=2,
    )
    agree(found, expected)


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("inputs", [80, 192])
def test_inputs_that_fill_no_chunk(kind, inputs):
    rng = np.random.default_rng(0)
    weight = make_random_tiles(rng, (2, 70, inputs), kind, 16 if kind == "int4" else 0)
    agree(*both(random_normal(rng, 3, inputs), weight, shape=LinearConfig(block_n=64)))


def test_a_part_of_wider_rows():
    rng = np.random.default_rng(0)
    agree(*both(random_normal(rng, 3, 200), make_random_tiles(rng, (2, 64, 128), "int8")))


@pytest.mark.parametrize("kinds", [(64, 64), (64, 0)])
def test_two_matrices_side_by_side(kinds):
    rng = np.random.default_rng(0)
    first, second = (
        make_random_tiles(rng, (2, n, 256), "int4", group) for n, group in zip((128, 96), kinds, strict=True)
    )
    x, norms = random_normal(rng, 2, 256), random_normal(rng, 2, 224)
    given = random_sum_sq(rng, 2, 3)
    counters = jnp.zeros(64, jnp.int32)
    for shape in (LinearConfig(block_n=32), LinearConfig(block_n=32, splits=2)):
        found, _ = fused_linear(
            x, first, ONE, counters, second_weight=second, sum_sq=given, eps=1e-6, next_norm=norms, config=shape
        )
        left, right = (fused_linear_ref(x, w, ONE, sum_sq=given, eps=1e-6) for w in (first, second))
        expected = jnp.concatenate([left.out, right.out], axis=1)
        assert_close(found.out, expected)
        assert_close(found.scaled, expected * norms[1:2])
        # By blocks of columns, which a reader takes some of.
        blocks = jnp.sum((expected**2).reshape(2, -1, 32), axis=-1)
        assert_close(found.sum_sq.partials, blocks)


@pytest.mark.parametrize("rows", [16, 33, 64])
def test_many_rows(rows):
    rng = np.random.default_rng(rows)
    weight = make_random_tiles(rng, (1, 128, 256), "int4", 64)
    agree(*both(random_normal(rng, rows, 256), weight, jnp.zeros(1, jnp.int32), residual=random_normal(rng, rows, 128)))


@pytest.mark.parametrize("program", ["first", "last"])
def test_the_real_output_projection(program):
    """5,120 inputs in full, the outputs cut to two tiles."""
    rng = np.random.default_rng(0)
    weight = make_random_tiles(rng, (1, 128 if program == "first" else 64, 5120), "int4", 64)
    shape = linear_heuristic(1, 2048, weight.num_chunks, 142)
    agree(*both(random_normal(rng, 1, 5120), weight, jnp.zeros(1, jnp.int32), shape))


def test_results_do_not_depend_on_the_order_of_programs():
    """Whichever program finishes a block last adds the shares, always in one order."""
    rng = np.random.default_rng(0)
    weight, x = make_random_tiles(rng, (1, 128, 512), "int8"), random_normal(rng, 2, 512)
    shape, counters = LinearConfig(splits=4), jnp.zeros(64, jnp.int32)
    programs, results = [(0, split, block) for split in range(4) for block in range(2)], []
    for _ in range(4):
        with restrict_programs([programs[i] for i in rng.permutation(len(programs))]):
            made, left = fused_linear(x, weight, jnp.zeros(1, jnp.int32), counters, config=shape)
        assert not np.any(left)
        results.append(made)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].out, other.out)
        np.testing.assert_array_equal(results[0].squares.parts, other.squares.parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 100}, "rows of 100 columns for a matrix of 128 inputs"),
        ({"other": 64}, "a second matrix cannot begin at output 96 with blocks of 64"),
        ({"splits": 2}, "2 blocks cannot be counted by 1 counters"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    rng = np.random.default_rng(0)
    other = make_random_tiles(rng, (1, change["other"], 128), "int8") if "other" in change else None
    with pytest.raises(LaunchError, match=message):
        fused_linear(
            random_normal(rng, 2, change.get("x", 128)), make_random_tiles(rng, (1, 96, 128), "int8"), jnp.zeros(1, jnp.int32),
            jnp.zeros(1, jnp.int32), second_weight=other, config=LinearConfig(splits=change.get("splits", 1)),
        )  # fmt: skip


def test_inside_a_loop_the_layer_is_data():
    rng = np.random.default_rng(0)
    weight, x = make_random_tiles(rng, (3, 64, 128), "int8"), random_normal(rng, 2, 128)

    def step(carry, layer):
        made, counters = fused_linear(x, weight, layer[None], carry, dtype=jnp.float32)
        return counters, made.out

    _, found = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(3, dtype=jnp.int32)))(jnp.zeros(64, jnp.int32))
    for layer in range(3):
        assert_close(found[layer], fused_linear_ref(x, weight, jnp.full(1, layer)).out)


def test_there_is_no_derivative():
    rng = np.random.default_rng(0)
    weight, x = make_random_tiles(rng, (1, 64, 128), "float32"), random_normal(rng, 2, 128)

    def loss(x):
        return fused_linear(x, weight, jnp.zeros(1, jnp.int32), jnp.zeros(64, jnp.int32))[0].out.sum()

    with pytest.raises(Exception, match="load the model with kernels='reference'"):
        jax.grad(loss)(x)


class TestShapes:
    """Block sizes that are chosen without a measurement."""

    @pytest.mark.parametrize("multiprocessors", [132, 142, 148, 188])
    @pytest.mark.parametrize(
        ("outputs", "inputs"), [(1344, 2048), (2048, 5120), (10240, 2048), (64, 2048), (154880, 2048)]
    )
    @pytest.mark.parametrize("rows", [1, 16, 17, 64])
    def test_they_are_possible(self, rows, outputs, inputs, multiprocessors):
        chunks = inputs // 64
        shape = linear_heuristic(rows, outputs, chunks, multiprocessors)
        assert shape.block_n in (32, 64)
        assert shape.block_m >= 16
        assert 1 <= shape.splits <= chunks
        # No share is empty.
        share = -(-chunks // shape.splits)
        assert share * (shape.splits - 1) < chunks
