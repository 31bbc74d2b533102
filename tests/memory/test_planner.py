"""Plans for devices and meshes, and the requests that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from glm_jax.errors import MemoryPlanError, ShardingError
from glm_jax.memory import devices, plan_memory, plan_memory_on_devices
from glm_jax.memory.estimates import PlacementSpec, cache_bytes
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from tests.memory.plans import FLASH, LARGE, SMALL, fake_device, plan_on


def test_plan_is_json():
    record = json.loads(json.dumps(plan_on(context=32_768, sequences=2).to_json()))
    assert record["fits"] is True
    assert record["parameters"] == 29_943_393_920
    assert record["device_needs"]["total"] == sum(record["device_needs"][k] for k in ("weights", "cache", "workspace"))
    assert sum(group["nbytes"] for group in record["parts"].values()) == record["weight_bytes"] + record["mtp_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be 1 to 202,752, the model's longest, not 0"),
        ({"context": 202_753}, "not 202,753"),
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"devices": 0}, "at least one device"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(MemoryPlanError, match=message):
        plan_memory(FLASH, device_bytes=LARGE, **options)


def test_device_counts_that_do_not_divide_are_refused():
    with pytest.raises(ShardingError, match="20 attention heads do not divide over 3"):
        plan_memory(FLASH, device_bytes=LARGE, devices=3, rules=get_sharding_preset("latency"))


def test_plan_for_local_devices(monkeypatch):
    monkeypatch.setattr(devices, "available_host_memory", lambda: 8_000_000)
    cpus = make_mesh(4)
    plan = plan_memory_on_devices(SMALL, cpus, rules=get_sharding_preset("latency"), dtype="float32", context=64)
    assert (plan.devices, plan.device_bytes, plan.bandwidth) == (4, 2_000_000, None)
    assert plan.memory_model.placement.on_cpu
    assert plan_memory_on_devices(SMALL, jax.devices()[:1], context=64).device_bytes == 8_000_000
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    gpus = [fake_device(bytes_limit=9 * 10**9, bytes_in_use=n) for n in (5, 10**9)]
    plan = plan_memory_on_devices(SMALL, gpus, rules=get_sharding_preset("latency"), context=64)
    assert (plan.devices, plan.device_bytes, plan.bandwidth) == (2, 8 * 10**9, 3_352_320_000_000)
    assert plan.memory_model.default_memory_fraction
    assert not plan.memory_model.placement.on_cpu


def test_plan_for_a_mesh_with_two_axes():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    plan = plan_memory_on_devices(SMALL, mesh, rules=Rules(batch="data", heads="model"), context=10, sequences=4)
    assert plan.devices == 8
    assert plan.requirement.cache == cache_bytes(SMALL, PlacementSpec(), 2, 10)


def test_jax_dtypes_are_accepted():
    plan = plan_memory(SMALL, device_bytes=LARGE, dtype=jnp.bfloat16, cache_dtype=jnp.dtype(jnp.float32), context=10)
    assert (plan.memory_model.placement.dtype, plan.memory_model.placement.cache_dtype) == ("bfloat16", "float32")
    assert plan.requirement.cache == 10 * plan.cache_bytes_per_token == 10 * 3 * 40 * 4
