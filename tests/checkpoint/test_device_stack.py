"""Stacks: pieces in any cut give the array, on one device and on every layout of a mesh."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from glm_jax.checkpoint import device_stack
from glm_jax.checkpoint.device_stack import StackBuilder

SHAPE = (3, 8, 6, 4)
VALUES = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
MESH_SIZES = {"data": 2, "model": 4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"))


def fill(stack, values, cuts):
    """Adds layer by layer, each cut into rows at `cuts`."""
    for slot, layer in enumerate(values):
        edges = [0, *sorted(cuts), len(layer)]
        for a, b in itertools.pairwise(edges):
            if a < b:
                stack.add(slot, a, layer[a:b])
    return stack.finish()


@given(st.sets(st.integers(1, 7)), st.permutations([None, "data", "model"]), st.integers(0, 2))
def test_any_cut_any_layout(mesh, cuts, axes, dropped):
    axes = [None if i < dropped else axis for i, axis in enumerate(axes)]
    axes = [a if a is None or n % MESH_SIZES[a] == 0 else None for a, n in zip(axes, SHAPE[1:], strict=True)]
    sharding = NamedSharding(mesh, jax.P(None, *axes))
    array = fill(StackBuilder(SHAPE, np.dtype(np.float32), sharding), VALUES, cuts)
    assert array.sharding == sharding
    assert np.array_equal(np.asarray(array), VALUES)


def device_region(shape, dtype, device, as_bits):
    assert not as_bits
    return device_stack._DeviceRegion(shape, dtype, device or jax.devices()[0])


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("spec", [None, jax.P(), jax.P(None, "model", None, "data"), jax.P(None, ("data", "model"))])
def test_both_kinds_of_region(mesh, monkeypatch, kind, spec):
    """The accelerators' way, tried out on CPU devices, gives what the host's way gives; also under a set mesh."""
    if kind == "device":
        monkeypatch.setattr(device_stack, "_create_region", device_region)
    sharding = None if spec is None else NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        array = fill(StackBuilder(SHAPE, np.dtype(np.float32), sharding), VALUES, {3})
    assert np.array_equal(np.asarray(array), VALUES)
    assert sharding is None or array.sharding == sharding


def test_casts_on_the_way():
    stack = StackBuilder((2, 5), np.dtype(jax.numpy.bfloat16), None)
    values = np.linspace(0, 1, 10, dtype=np.float32).reshape(2, 5)
    stack.add(None, 0, values)
    assert np.array_equal(np.asarray(stack.finish()), values.astype(jax.numpy.bfloat16))


def test_large_pieces_are_written_in_blocks(monkeypatch):
    monkeypatch.setattr(device_stack, "_BLOCK_BYTES", 40)
    array = fill(StackBuilder(SHAPE, np.dtype(np.float32), None), VALUES, set())
    assert np.array_equal(np.asarray(array), VALUES)


def test_host_memory_becomes_the_array():
    """On CPU nothing is copied: JAX takes the buffer over."""
    stack = StackBuilder((4, 1000), np.dtype(np.float32), None)
    (region,) = stack._regions.values()
    address = region._buffer.ctypes.data
    stack.add(None, 0, np.ones((4, 1000), np.float32))
    assert stack.finish().unsafe_buffer_pointer() == address


def test_replicas_on_cpu_share_their_memory(mesh):
    stack = StackBuilder((4, 64), np.dtype(np.float32), NamedSharding(mesh, jax.P(None, "model")))
    assert len(stack._regions) == 4
    stack.add(None, 0, np.ones((4, 64), np.float32))
    array = stack.finish()
    assert len({shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}) == 4


def test_donating_a_taken_over_buffer_is_safe():
    """XLA may not reuse memory that it does not own; the values must still be right."""
    stack = StackBuilder((64, 64), np.dtype(np.float32), None)
    stack.add(None, 0, np.ones((64, 64), np.float32))
    double = jax.jit(lambda x: x * 2.0, donate_argnums=0)
    array = double(double(stack.finish()))
    assert np.all(np.asarray(array) == 4.0)
