"""Properties that only a GPU shows: outputs that alias inputs, large shared memory, launches of the whole loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.bench.glm_jax_backend import GlmJaxBackend
from pallas_kernels import _launch_backends, random_arrays
from pallas_kernels._launch import record_kernels
from pallas_kernels.mla_decode import LatentCacheArrays
from pallas_kernels.specs import Sweep, list_specs, relative_errors

pytestmark = pytest.mark.gpu
ONE = jnp.ones(1, jnp.int32)
ROWS, LAYERS = 8, 3


def build_spec(op, **sweep):
    (spec,) = list_specs(Sweep(batch_sizes=(ROWS,), **sweep), [op])
    return spec, *jax.jit(spec.make_inputs, static_argnums=0)(LAYERS)


def test_the_call_for_ptx_works():
    """Otherwise kernels are launched by jax-triton, outside of graphs, and the tests of graphs below fail too."""
    assert _launch_backends._probe_failure("ptx") is None
    assert _launch_backends.select_backend() == "ptx"


def test_the_cache_is_written_in_place_and_nowhere_else():
    spec, inputs, state = build_spec("queries", weight_kinds=("int4",))
    shape = state["cache"].data.shape
    before = jax.jit(lambda: random_arrays.random_cache_rows(shape, "bfloat16", 9)[0])()
    copy, address = np.asarray(before), before.unsafe_buffer_pointer()
    run = jax.jit(spec.run, donate_argnums=1)
    _, after = run(inputs, {"cache": LatentCacheArrays(before)}, ONE)
    assert before.is_deleted()
    assert after["cache"].data.unsafe_buffer_pointer() == address
    changed = np.any(np.asarray(after["cache"].data) != copy, axis=-1)
    expected = np.zeros_like(changed)
    expected[1, np.arange(ROWS), np.asarray(inputs["positions"])] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("op", ["linear", "down"])
def test_counters_are_left_at_zero_in_their_place(op):
    match = {"linear": "/o/", "down": ""}[op]
    (spec,) = list_specs(Sweep(batch_sizes=(1,), weight_kinds=("int4",)), [op], match)
    inputs, state = jax.jit(spec.make_inputs, static_argnums=0)(LAYERS)
    address = state["counters"].unsafe_buffer_pointer()
    run = jax.jit(lambda inputs, state, index: spec.run(inputs, state, index)[1], donate_argnums=1)
    for _ in range(3):
        state = run(inputs, state, ONE)
        assert state["counters"].unsafe_buffer_pointer() == address
        assert not np.any(state["counters"])


def test_a_kernel_with_more_shared_memory_than_needs_no_opt_in():
    spec, inputs, state = build_spec("attend", context_lengths=(1000,), cache_kinds=("bfloat16",))
    with record_kernels() as kernels:
        actual = jax.jit(
            lambda inputs, state, index: spec.comparable_outputs(inputs, *spec.run(inputs, state, index), index)
        )(inputs, state, ONE)
    assert max(kernel.shared_memory for kernel in kernels) > 48 * 1024
    expected = spec.comparable_outputs(inputs, *spec.reference(inputs, state, ONE), ONE)
    assert max(relative_errors(actual, expected)) <= spec.tolerance(jnp.float32)


@pytest.fixture(scope="module")
def three_layers():
    """A dense layer and two of experts at full width, which have every kernel."""
    return GlmJaxBackend("synthetic:flash?layers=3&seed=0", "bfloat16", "int4", kernels="triton")


def test_the_whole_loop_is_one_graph_of_eight_kernels_for_a_layer(three_layers):
    ours = three_layers
    made = ours.compile_stats(ours.start_with_random_cache(1, 1024, 16))
    kernels, experts = made["kernels"], ours.cfg.num_hidden_layers - 1
    assert (
        kernels["absorbed_q_proj_kernel"]
        == kernels["flash_decode_kernel"]
        == kernels["combine_v_proj_kernel"]
        == experts + 1
    )
    assert kernels["gate_up_kernel"] == experts + 1
    assert kernels["down_kernel"] == experts
    assert kernels["fused_linear_kernel"] <= 3 * experts + 3  # and the dense layer's three
    assert kernels["lm_head_sample_kernel"] == 1  # which samples, too
    assert made["launches_per_token"] <= 8 * (experts + 1) + 15  # embedding, final norm, head, sampling
    assert (made["graph_pieces"], made["launches_outside_graphs"]) == (1, 0)
    assert (made["copies_per_token"], made["collectives"]) == (0, [])
    assert made["alias_bytes"] >= made["cache_bytes"]
    assert made["temp_bytes"] < 64e6


def test_the_loop_takes_the_cache_over(three_layers):
    ours = three_layers
    state = ours.start_with_random_cache(1, 1024, 16)
    address = state.cache.data.unsafe_buffer_pointer()
    _, first = ours.decode(state, 16)
    assert state.cache.data.unsafe_buffer_pointer() == address
    _, second = ours.decode(state, 16)
    np.testing.assert_array_equal(first, second)
