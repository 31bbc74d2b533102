"""Known GPUs, and the memory that devices, machines and containers leave to a process."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from glm_jax.errors import MemoryPlanError
from glm_jax.memory import devices
from glm_jax.memory.devices import known_gpus, parse_gpus
from tests.memory.plans import fake_device, plan_on

ROOT = Path(__file__).resolve().parents[2]


def test_known_gpus():
    assert list(known_gpus())[:5] == ["rtx6000-ada", "rtxpro6000", "h100", "h200", "b200"]
    for name, gpu in known_gpus().items():
        assert 20e9 < gpu.memory_bytes < 200e9, name
        assert 8e11 < gpu.bandwidth < 8e12, name
        assert gpu.source.startswith("https://"), name
        assert parse_gpus(name) == (gpu, 1)
        assert parse_gpus(f" {name.upper()}X16 ") == (gpu, 16)
    assert {name for name in known_gpus() if plan_on(name).fits} == {
        "rtxpro6000",
        "h100",
        "h200",
        "b200",
        "a100-80gb",
    }


@pytest.mark.parametrize(
    "text", ["", "x4", "h101", "h100x", "h100x0", "h100x-1", "h100x4x2", "h100 x4", "rtx4091", "h100x1.5"]
)
def test_unknown_gpus_are_refused_with_a_list(text):
    with pytest.raises(MemoryPlanError, match="there are rtx6000-ada, rtxpro6000, h100"):
        parse_gpus(text)


def test_close_name_is_offered():
    with pytest.raises(MemoryPlanError, match="did you mean rtx6000-ada"):
        parse_gpus("rtx6000ada")


def test_available_memory_of_a_gpu_is_its_limit_minus_the_bytes_in_use():
    assert devices.available_device_memory(fake_device(bytes_limit=1000)) == 1000
    assert devices.available_device_memory(fake_device(bytes_limit=1000, bytes_in_use=300)) == 700
    assert devices.available_device_memory(fake_device(bytes_limit=1000, bytes_in_use=1300)) == 0


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that writes the files in which Linux reports memory and control groups."""
    own, groups = tmp_path / "self", tmp_path / "groups"
    for name, path in (("_MEMINFO", tmp_path / "meminfo"), ("_OWN_CGROUP", own), ("_CGROUPS", groups)):
        monkeypatch.setattr(devices, name, path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_available_memory_of_a_cpu_is_that_of_the_machine(machine):
    whole = devices.available_device_memory(jax.devices("cpu")[0])
    assert whole > 1 << 28
    machine("meminfo", "MemTotal:       8000 kB\nMemAvailable:   3000 kB\nSwapFree: 1 kB\n")
    assert devices.available_host_memory() == 3000 * 1024
    machine("meminfo", "nothing known")
    assert devices.available_host_memory() == whole


def test_container_limit_minus_its_usage_is_available(machine):
    machine("self", "0::/\n")
    machine("groups/memory.max", "max\n")
    whole = devices.available_host_memory()
    assert whole > 1 << 28
    machine("groups/memory.max", "1000000\n")
    assert devices.available_host_memory() == 1_000_000
    machine("groups/memory.current", "700000\n")
    machine("groups/memory.stat", "anon 5\ninactive_file 100000\n")
    assert devices.available_host_memory() == 400_000
    machine("groups/memory.current", "3000000\n")
    assert devices.available_host_memory() == 0


def test_narrowest_of_nested_containers_counts(machine):
    machine("self", "0::/user/job\n")
    machine("groups/user/memory.max", "9000000\n")
    machine("groups/user/memory.current", "8800000\n")
    machine("groups/user/job/memory.max", "5000000\n")
    assert devices.available_host_memory() == 200_000


def test_container_of_cgroup_version_1(machine):
    machine("self", "5:cpu,cpuacct:/x\n4:memory:/job\n")
    machine("groups/memory/job/memory.limit_in_bytes", "5000000\n")
    machine("groups/memory/job/memory.usage_in_bytes", "4000000\n")
    machine("groups/memory/job/memory.stat", "inactive_file 7\ntotal_inactive_file 500000\n")
    assert devices.available_host_memory() == 1_500_000


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3_352_320_000_000),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1_792_000_000_000),
        ("cpu", None),
    ],
)
def test_bandwidth_of_local_devices(kind, bandwidth):
    assert devices.device_bandwidth(fake_device(kind)) == bandwidth


def test_default_memory_fraction_is_recognized(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert devices.uses_default_memory_fraction(fake_device())
    assert not devices.uses_default_memory_fraction(fake_device(platform="cpu"))
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert not devices.uses_default_memory_fraction(fake_device())


def test_peak_memory_on_a_cpu_is_that_of_the_process():
    peak, location = devices.peak_memory()
    assert location == "process"
    assert 50e6 < peak < 1e12


def test_models_load_where_the_system_has_no_resource_module():
    script = """
import sys
sys.modules["resource"] = None
import glm_jax
from glm_jax.memory import peak_memory
assert glm_jax.LLM and peak_memory() == (0, "unknown")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
