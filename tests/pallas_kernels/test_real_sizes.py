"""Kernels at the sizes of the real model, some programs of each: the first, the last, and one in between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._interpreter import restrict_programs
from pallas_kernels.grouped_matmul import gated_linear_unit, grouped_matmul
from pallas_kernels.grouped_matmul.config import GroupedMatmulConfig
from pallas_kernels.mla_decode import AttentionDims, LatentCacheArrays, combine_v_proj, flash_decode
from pallas_kernels.mla_decode.config import FlashDecodeConfig
from pallas_kernels.moe import Dispatch, RouterConfig, build_dispatch, down, gate_up
from pallas_kernels.quant_matmul import fused_linear
from pallas_kernels.quant_matmul.config import LinearConfig
from pallas_kernels.tiles import Tiles, chunk_inputs
from tests.pallas_kernels.builders import assert_close, random_normal, random_sum_sq
from tests.pallas_kernels.references import combine_v_proj_ref, dequantize_tiles, flash_decode_ref, route_ref

pytestmark = pytest.mark.kernels
ZERO = jnp.zeros(1, jnp.int32)
ROUTED = RouterConfig(experts=64, experts_per_token=4, normalize_weights=True, scaling_factor=1.8)


def random_tiles(rng, stack, outputs, inputs, kind, group_size=0):
    """Words of random bits: every code is one of an integer."""
    columns, chunks = -(-outputs // 64), inputs // chunk_inputs(kind)
    words = rng.integers(0, 1 << 32, (*stack, columns, chunks, 16, 64), np.uint32)
    shape = (*stack, columns, inputs // group_size if group_size else 1, 64)
    scales = rng.uniform(0.5, 1.5, shape) * inputs**-0.5 / (4 if kind == "int4" else 64)
    made = Tiles(jnp.asarray(words), jnp.asarray(scales, jnp.bfloat16), kind=kind, outputs=outputs, inputs=inputs)
    return dataclasses.replace(made, group_size=group_size)


def block(tiles, *index):
    """The values ``[64, K]`` of one tile."""
    *stack, column = index
    one = jax.tree.map(lambda array: array[tuple(stack)][column : column + 1], tiles)
    return np.asarray(dequantize_tiles(dataclasses.replace(one, outputs=64)))


def some_columns(rng, count):
    return sorted({0, int(rng.integers(count)), count - 1})


# Every launch copies the weights, so `make test-kernels` runs the last column alone, with the largest offsets.
COLUMNS = pytest.mark.parametrize(
    "which", [pytest.param(slice(-1), marks=pytest.mark.soak), slice(-1, None)], ids=["first columns", "last column"]
)
PROJECTIONS = [
    ("kv_a", 576, 2048, "int8", 0),
    ("q_b", 5120, 768, "int4", 64),
    pytest.param("o", 2048, 5120, "int4", 64, marks=pytest.mark.soak),
    pytest.param("dense", 2048, 10_240, "int8", 0, marks=pytest.mark.soak),
    ("head", 154_880, 2048, "int4", 64),
]


@pytest.mark.parametrize(("name", "outputs", "inputs", "kind", "group"), PROJECTIONS)
@pytest.mark.parametrize("rows", [1, pytest.param(64, marks=pytest.mark.soak)])
@COLUMNS
def test_projections(name, outputs, inputs, kind, group, rows, which):
    rng = np.random.default_rng([outputs, rows])
    weight, x = random_tiles(rng, (1,), outputs, inputs, kind, group), random_normal(rng, rows, inputs)
    shape = LinearConfig(block_m=16 if rows == 1 else 32, splits=2 if outputs < 6000 else 1)
    counters = jnp.zeros(8192, jnp.int32)
    for column in some_columns(rng, weight.num_tiles)[which]:
        last = -(-rows // shape.block_m) - 1
        with restrict_programs([(last, split, column) for split in range(shape.splits)]):
            made, _ = fused_linear(x, weight, ZERO, counters, config=shape)
        here = slice(last * shape.block_m, None), slice(column * 64, column * 64 + 64)
        assert_close(np.asarray(made.out)[here], np.asarray(x)[here[0]] @ block(weight, 0, column).T)


@pytest.mark.parametrize("tokens", [1, 64])
@COLUMNS
def test_experts_of_a_step(tokens, which):
    """One token, whose pairs are programs of their own, and 64, whose pairs are sorted."""
    rng = np.random.default_rng(tokens)
    gate, up = (random_tiles(rng, (1, 64), 1536, 2048, "int4", 64) for _ in range(2))
    x, parts = random_normal(rng, tokens, 2048), random_sum_sq(rng, tokens, 7)
    parts = type(parts)(parts.partials, 0, parts.partials.shape[1])
    logits, bias = random_normal(rng, tokens, 64), 0.1 * random_normal(rng, 1, 64)
    numbers, _ = route_ref(ROUTED, logits, bias[0])
    plan = build_dispatch(ROUTED, ZERO, logits, bias) if tokens > 1 else None
    factor = 1 / np.sqrt(np.asarray(parts.partials).sum(axis=1, keepdims=True) / 2048 + 1e-5)
    rows = np.asarray(x) * factor
    filled = np.arange(4) if plan is None else np.flatnonzero(np.asarray(plan.block_sizes))
    for column in some_columns(rng, 24)[which]:
        who = int(rng.choice(filled))
        with restrict_programs([(2 * column, who), (2 * column + 1, who)]):
            h, _ = gate_up(
                ROUTED, x, parts, ZERO, logits, bias, gate, up, None, eps=1e-5, dispatch=plan
            )  # the shape's blocks have 32 outputs
        pairs = [who] if plan is None else np.asarray(plan.pair_ids)[who, : int(plan.block_sizes[who])].tolist()
        found = np.asarray(h).reshape(-1, 1536)[pairs][:, column * 64 : column * 64 + 64]
        expert = int(np.asarray(numbers).reshape(-1)[pairs[0]])
        mine = rows[[pair // 4 for pair in pairs]]
        one, two = (mine @ block(w, 0, expert, column).T for w in (gate, up))
        assert_close(found, one / (1 + np.exp(-one)) * two)


@COLUMNS
def test_experts_down(which):
    rng = np.random.default_rng(5)
    weight, shared = (random_tiles(rng, (1, *n), 2048, 1536, "int4", 64) for n in ((64,), ()))
    h, residual = random_normal(rng, 5 * 1536), random_normal(rng, 1, 2048)
    plan = Dispatch(jnp.asarray([3, 63, 0, 17], jnp.int32), random_normal(rng, 4))
    counters = jnp.zeros(64, jnp.int32)
    for column in some_columns(rng, 32)[which]:
        half = 2 * column + 1
        with restrict_programs([(half, who) for who in range(5)]):
            made, _ = down(ROUTED, h, plan, ZERO, weight, shared, residual, residual, counters)
        rows = np.asarray(h).reshape(5, 1536)
        outs = [
            rows[i] @ block(weight, 0, int(plan.expert_ids[i]), column).T * float(plan.weights[i]) for i in range(4)
        ]
        here = slice(half * 32, half * 32 + 32)
        expected = sum([*outs, rows[4] @ block(shared, 0, column).T])[32:] + np.asarray(residual)[0, here]
        assert_close(np.asarray(made.out)[0, here], expected)


@pytest.mark.parametrize("length", [pytest.param(2048, marks=pytest.mark.soak), 4097])
def test_attention(length):
    rng = np.random.default_rng(length)
    att = AttentionDims(
        heads=20, nope=192, rope=64, latent=512, value_dim=256, query_latent=768, interleave=True, eps=1e-6
    )
    cache, query = LatentCacheArrays(random_normal(rng, 1, 1, 4352, 576)), random_normal(rng, 1, 20, 576)
    positions = jnp.full(1, length - 1, jnp.int32)
    parts = flash_decode(att, query, cache, ZERO, positions, config=FlashDecodeConfig(splits=8))
    v_b = random_tiles(rng, (1, 20), 256, 512, "int8")
    expected = combine_v_proj_ref(
        att, flash_decode_ref(att, query, cache, ZERO, positions), ZERO, v_b, dtype=jnp.float32
    )
    assert_close(combine_v_proj_ref(att, parts, ZERO, v_b, dtype=jnp.float32), expected)
    with restrict_programs([(0, 0, 0), (19, 3, 0)]):
        found = combine_v_proj(att, parts, ZERO, v_b, dtype=jnp.float32)
    for head, column in ((0, 0), (19, 3)):
        here = slice(head * 256 + column * 64, head * 256 + column * 64 + 64)
        assert_close(np.asarray(found)[:, here], np.asarray(expected)[:, here])


@pytest.mark.parametrize(("kind", "group"), [("int4", 64), ("int8", 0)])
@COLUMNS
def test_many_rows(kind, group, which):
    rng = np.random.default_rng(group)
    gate, up = (random_tiles(rng, (1,), 1536, 2048, kind, group) for _ in range(2))
    x = random_normal(rng, 300, 2048)
    shape = GroupedMatmulConfig()
    for column in some_columns(rng, 24)[which]:
        here = slice(256, 300), slice(column * 64, column * 64 + 64)
        one, two = (np.asarray(x)[here[0]] @ block(w, 0, column).T for w in (gate, up))
        with restrict_programs([(2, column)]):
            assert_close(np.asarray(grouped_matmul(x, gate, ZERO, config=shape))[here], one)
            made = np.asarray(gated_linear_unit(x, gate, up, ZERO, config=shape))[here]
        assert_close(made, one / (1 + np.exp(-one)) * two)
