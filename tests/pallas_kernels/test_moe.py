"""Experts of (token, expert) pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._launch import LaunchError
from pallas_kernels.moe import RouterConfig, build_dispatch, down, gate_up
from pallas_kernels.moe.config import MoeConfig
from tests.pallas_kernels.builders import assert_close, make_random_tiles, random_normal, random_sum_sq
from tests.pallas_kernels.references import build_dispatch_ref, dequantize_tiles, down_ref, gate_up_ref, route_ref

pytestmark = pytest.mark.kernels
ONE = jnp.ones(1, jnp.int32)
GROUPS = {"int4": 32, "uint4": 32}


class Case:
    """Weights of two layers, and activations."""

    def __init__(self, seed, rows, *, width=64, shared=96, hidden=128, kind="int4", other="int8", router=None):
        rng = np.random.default_rng(seed)
        self.router = router or RouterConfig(experts=6, experts_per_token=3, normalize_weights=True, scaling_factor=1.8)
        experts = self.router.experts
        group, other_group = GROUPS.get(kind, 0), GROUPS.get(other, 0)
        self.gate, self.up = (make_random_tiles(rng, (2, experts, width, hidden), kind, group) for _ in range(2))
        self.down = make_random_tiles(rng, (2, experts, hidden, width), kind, group)
        self.shared = self.shared_down = None
        if shared:
            self.shared = tuple(make_random_tiles(rng, (2, shared, hidden), other, other_group) for _ in range(2))
            self.shared_down = make_random_tiles(rng, (2, hidden, shared), other, other_group)
        self.x, self.sum_sq = random_normal(rng, rows, hidden), random_sum_sq(rng, rows, 5)
        self.sum_sq = type(self.sum_sq)(self.sum_sq.partials, 0, self.sum_sq.partials.shape[1])
        self.logits, self.bias = random_normal(rng, rows, experts), 0.1 * random_normal(rng, 2, experts)
        self.residual, self.norms = random_normal(rng, rows, hidden), random_normal(rng, 4, hidden)

    def check(self, config=MoeConfig(), sorted_too=(False, True)):
        router, weights = self.router, (self.gate, self.up, self.shared)
        rest = (self.down, self.shared_down, self.residual, self.norms)
        zeros = jnp.zeros(64, jnp.int32)
        for is_sorted in sorted_too:
            sort = (build_dispatch, build_dispatch_ref)
            plans = [f(router, ONE, self.logits, self.bias) if is_sorted else None for f in sort]
            h, plan_ref = gate_up_ref(
                router, self.x, self.sum_sq, ONE, self.logits, self.bias, *weights, eps=1e-5, dispatch=plans[1]
            )
            expected, _ = down_ref(router, h, plan_ref, ONE, *rest, zeros, next_norm_offset=2)

            def run_gate_up(x, plan):
                given = (x, self.sum_sq, ONE, self.logits, self.bias, *weights)
                return gate_up(router, *given, eps=1e-5, dispatch=plan, config=config)

            actual_h, plan = jax.jit(run_gate_up)(self.x, plans[0])
            assert_close(actual_h, h)
            run = jax.jit(lambda h, p, c: down(router, h, p, ONE, *rest, c, next_norm_offset=2, config=config))
            self.compare(*run(h, plan, zeros), expected)

    @staticmethod
    def compare(actual, counters, expected):
        assert not np.any(counters)
        assert_close(actual.out, expected.out)
        assert_close(actual.scaled, expected.scaled)
        assert_close(jnp.sum(actual.sum_sq.partials, axis=1), expected.sum_sq.partials[:, 0])


@pytest.mark.parametrize(
    ("kind", "other"), [("int4", "int8"), ("int8", "int4"), ("uint4", "fp8"), ("float32", "float32")]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_storages_of_experts_and_shared_expert(rows, kind, other):
    Case(rows, rows, kind=kind, other=other).check()


@pytest.mark.parametrize("rows", [8, 17])
def test_more_tokens(rows):
    Case(rows, rows, kind="int8", width=32, shared=32).check(MoeConfig(block_n=64))


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(1, 3, 1), (7, 5, 2), (40, 4, 2), (33, 64, 4), (64, 64, 4), (128, 64, 4)]
)
def test_sorting_pairs(tokens, experts, chosen):
    """Every pair is in a block of its expert, in the order of tokens; blocks of an expert are full but the last."""
    rng = np.random.default_rng(tokens)
    router = RouterConfig(experts=experts, experts_per_token=chosen, normalize_weights=True, scaling_factor=1.8)
    logits, bias = random_normal(rng, tokens, experts), 0.1 * random_normal(rng, 2, experts)
    expert_ids, weights = route_ref(router, logits, bias[1])
    expert_of_pair = np.asarray(expert_ids).reshape(-1)
    for implementation in ("triton", "reference"):
        dispatch, seen = build_dispatch(router, ONE, logits, bias, implementation=implementation), []
        assert_close(dispatch.weights, weights.reshape(-1))
        blocks = (np.asarray(x) for x in (dispatch.expert_ids, dispatch.block_sizes, dispatch.pair_ids))
        for expert, size, pairs in zip(*blocks, strict=True):
            assert set(expert_of_pair[pairs[:size]]) <= {expert}
            seen += pairs[:size].tolist()
        assert seen == np.argsort(expert_of_pair, kind="stable").tolist()
        assert np.count_nonzero(dispatch.block_sizes) == sum(-(-n // 16) for n in np.bincount(expert_of_pair))


def test_blocks_of_another_height():
    case = Case(0, 9, kind="int8")
    plan = build_dispatch(case.router, ONE, case.logits, case.bias)
    given = (case.router, case.x, case.sum_sq, ONE, case.logits, case.bias, case.gate, case.up, case.shared)
    with pytest.raises(LaunchError, match="blocks of 16 pairs, and programs of 32 rows"):
        gate_up(*given, eps=1e-5, dispatch=plan, config=MoeConfig(block_m=32))


def test_no_shared_expert():
    Case(0, 2, shared=0, kind="int8").check()


def test_widths_that_fill_no_block():
    Case(0, 2, width=48, shared=80, hidden=96, kind="int8").check()


def test_one_expert_takes_every_token():
    case = Case(
        0,
        4,
        kind="int8",
        router=RouterConfig(experts=5, experts_per_token=1, normalize_weights=False, scaling_factor=1.0),
    )
    case.logits = jnp.zeros((4, 5)).at[:, 2].set(9.0)
    assert set(np.asarray(route_ref(case.router, case.logits, case.bias[1])[0]).ravel()) == {2}
    case.check()


def test_an_expert_with_more_pairs_than_a_block_holds():
    case = Case(4, 40, kind="float32", width=32, shared=0, hidden=64)
    case.bias = case.bias.at[1, 2].set(50.0)
    case.check(sorted_too=(True,))


@pytest.mark.parametrize("in_order", [False, True])
def test_a_logit_that_is_not_a_number_is_seen(in_order):
    """As in the reference, a NaN is the first choice: its token is NaN, and the others are not."""
    case = Case(5, 3, kind="float32", width=32, shared=32, hidden=64)
    case.logits = case.logits.at[1].set(jnp.nan).at[2, 4].set(jnp.nan)
    plan = build_dispatch(case.router, ONE, case.logits, case.bias) if in_order else None
    h, plan = gate_up(
        case.router, case.x, case.sum_sq, ONE, case.logits, case.bias, case.gate, case.up, case.shared, eps=1e-5,
        dispatch=plan,
    )  # fmt: skip
    counters = jnp.zeros(64, jnp.int32)
    rest = (case.down, case.shared_down, case.residual, case.norms, counters)
    result, _ = down(case.router, h, plan, ONE, *rest, next_norm_offset=2)
    assert np.isfinite(result.out[0]).all()
    assert np.isnan(result.out[1:]).all()


def test_equal_scores_go_to_the_first_expert():
    case = Case(0, 2, kind="float32", other="float32")
    case.logits, case.bias = jnp.zeros((2, 6)), jnp.zeros((2, 6))
    assert np.asarray(route_ref(case.router, case.logits, case.bias[1])[0]).tolist() == [[0, 1, 2]] * 2
    case.check()


def test_a_feed_forward_without_experts():
    none = RouterConfig(experts=1, experts_per_token=0, normalize_weights=False, scaling_factor=1.0)
    case = Case(0, 3, kind="int8")
    given = (none, case.x, case.sum_sq, ONE, case.logits, case.bias, *case.shared, case.shared)
    actual, _ = gate_up(*given, eps=1e-5)
    wide = case.x * jax.lax.rsqrt(jnp.sum(case.sum_sq.partials, axis=1, keepdims=True) / 128 + 1e-5)
    gate, up = (wide @ dequantize_tiles(jax.tree.map(lambda x: x[1], w)).T for w in case.shared)
    assert_close(actual, (jax.nn.silu(gate) * up).reshape(-1), 1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_real_router(rows):
    """64 experts, four of them, from real widths cut to one block of outputs."""
    router = RouterConfig(experts=64, experts_per_token=4, normalize_weights=True, scaling_factor=1.8)
    Case(rows, rows, width=32, shared=32, hidden=64, kind="int8", router=router).check()
