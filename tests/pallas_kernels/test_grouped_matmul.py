"""Products of many rows, with one matrix or with one for each block of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels._launch import LaunchError
from pallas_kernels.grouped_matmul import RowBlocks, choose_block_m, gated_linear_unit, grouped_matmul
from pallas_kernels.grouped_matmul.config import GroupedMatmulConfig
from tests.pallas_kernels.builders import assert_close, make_random_tiles, random_normal
from tests.pallas_kernels.references import gated_linear_unit_ref, grouped_matmul_ref

pytestmark = pytest.mark.kernels
ONE = jnp.ones(1, jnp.int32)
STORAGES = [
    ("int4", 64), ("int4", 32), ("int4", 128), ("uint4", 64), ("int8", 0), ("int8", 32), ("uint8", 0), ("fp8", 0),
    ("fp8", 128), ("fp4", 16), ("bfloat16", 0), ("float32", 0),
]  # fmt: skip


def make_row_blocks(expert_of_row, experts, height):
    """Blocks of one expert each, the last of them without rows."""
    expert_ids, row_ids = [], []
    for expert in range(experts):
        rows = [row for row, other in enumerate(expert_of_row) if other == expert]
        for first in range(0, len(rows), height):
            block = rows[first : first + height]
            expert_ids.append(expert)
            row_ids.append(block + [-1] * (height - len(block)))
    return RowBlocks(jnp.asarray([*expert_ids, -1], jnp.int32), jnp.asarray([*row_ids, [-1] * height], jnp.int32))


@pytest.mark.parametrize(("kind", "group"), STORAGES)
def test_storages(kind, group):
    rng = np.random.default_rng(0)
    weight, up = (make_random_tiles(rng, (2, 96, 256), kind, group) for _ in range(2))
    x = random_normal(rng, 21, 256)
    assert_close(jax.jit(grouped_matmul)(x, weight, ONE), grouped_matmul_ref(x, weight, ONE))
    assert_close(jax.jit(gated_linear_unit)(x, weight, up, ONE), gated_linear_unit_ref(x, weight, up, ONE))


@pytest.mark.parametrize("scale", ["bfloat16", "float16", "float32"])
def test_dtypes_of_scales(scale):
    rng = np.random.default_rng(1)
    weight = make_random_tiles(rng, (2, 64, 128), "int4", 32, scale_dtype=scale)
    x = random_normal(rng, 17, 128)
    assert_close(grouped_matmul(x, weight, ONE), grouped_matmul_ref(x, weight, ONE))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 128), (130, 40, 72), (33, 200, 136), (16, 128, 320)])
@pytest.mark.parametrize("block_n", [32, 64])
def test_sizes_that_fill_no_block(rows, outputs, inputs, block_n):
    rng = np.random.default_rng(rows)
    weight = make_random_tiles(rng, (2, outputs, inputs), "int8")
    x = random_normal(rng, rows, inputs)
    config = GroupedMatmulConfig(block_m=choose_block_m(rows, 1), block_n=block_n)
    assert_close(grouped_matmul(x, weight, ONE, config=config), grouped_matmul_ref(x, weight, ONE))
    assert_close(
        gated_linear_unit(x, weight, weight, ONE, config=config), gated_linear_unit_ref(x, weight, weight, ONE)
    )


def test_two_tiles_in_a_block():
    rng = np.random.default_rng(2)
    weight = make_random_tiles(rng, (2, 230, 128), "int4", 64)
    x = random_normal(rng, 20, 128)
    assert_close(
        grouped_matmul(x, weight, ONE, config=GroupedMatmulConfig(block_m=32, block_n=128)),
        grouped_matmul_ref(x, weight, ONE),
    )


@settings(max_examples=6, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 20), experts=st.integers(1, 5))
def test_experts(data, tokens, experts):
    """Any assignment of rows, including experts without rows; rows in no block are not compared."""
    chosen = data.draw(st.integers(1, min(3, experts)))
    owners = data.draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * chosen, max_size=tokens * chosen))
    rng = np.random.default_rng(tokens)
    gate, up = (make_random_tiles(rng, (2, experts, 48, 64), "int8") for _ in range(2))
    down = make_random_tiles(rng, (2, experts, 64, 48), "int4", 16)
    x, row_scales = random_normal(rng, tokens, 64), random_normal(rng, tokens * chosen)
    blocks = make_row_blocks(owners, experts, 16)
    assigned = np.asarray(owners) >= 0
    h = gated_linear_unit_ref(x, gate, up, ONE, blocks=blocks, outputs_per_row=chosen)
    actual = gated_linear_unit(x, gate, up, ONE, blocks=blocks, outputs_per_row=chosen)
    assert_close(np.asarray(actual)[assigned], np.asarray(h)[assigned])
    expected = grouped_matmul_ref(h, down, ONE, blocks=blocks, row_scales=row_scales)
    actual = grouped_matmul(h, down, ONE, blocks=blocks, row_scales=row_scales)
    assert_close(np.asarray(actual)[assigned], np.asarray(expected)[assigned])


def test_one_expert_takes_every_row():
    rng = np.random.default_rng(3)
    weight = make_random_tiles(rng, (2, 4, 64, 64), "int8")
    x = random_normal(rng, 70, 64)
    blocks = make_row_blocks([2] * 70, 4, 32)
    assert_close(grouped_matmul(x, weight, ONE, blocks=blocks), grouped_matmul_ref(x, weight, ONE, blocks=blocks))


def test_inputs_that_do_not_match():
    rng = np.random.default_rng(4)
    weight, other = make_random_tiles(rng, (2, 64, 64), "int8"), make_random_tiles(rng, (2, 64, 64), "int4", 32)
    x = random_normal(rng, 4, 64)
    with pytest.raises(NotImplementedError, match="stored in the same way"):
        gated_linear_unit(x, weight, other, ONE, implementation="triton")
    assert_close(gated_linear_unit(x, weight, other, ONE), gated_linear_unit_ref(x, weight, other, ONE))
    with pytest.raises(LaunchError, match=r"rows \[4, 32\] do not fit a matrix of 64 inputs"):
        grouped_matmul(x[:, :32], weight, ONE)
    with pytest.raises(LaunchError, match=r"stack \[2\] of matrices"):
        grouped_matmul(x, weight, ONE, blocks=make_row_blocks([0] * 4, 1, 16))
    stack = make_random_tiles(rng, (2, 3, 64, 64), "int8")
    with pytest.raises(LaunchError, match="blocks of 16 rows, and programs of 32"):
        grouped_matmul(x, stack, ONE, blocks=make_row_blocks([0] * 4, 3, 16), config=GroupedMatmulConfig(block_m=32))
