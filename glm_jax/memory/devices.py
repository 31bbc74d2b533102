"""Memory and bandwidth of the local devices and of known GPUs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Protocol

import jax

from glm_jax.errors import MemoryPlanError

try:
    import resource
except ImportError:  # not available on every system
    resource = None

_MEMINFO, _CGROUPS, _OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMORY_FRACTION_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


class Device(Protocol):
    """The attributes of a :class:`jax.Device` that a memory plan reads."""

    @property
    def platform(self) -> str:
        """JAX's name of the backend, such as "cpu" or "gpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """Name of the hardware."""
        ...

    def memory_stats(self) -> dict[str, int] | None:
        """Returns the allocator's counters in bytes; ``None`` on devices that keep none."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuInfo:
    """A known GPU.

    Attributes:
        name: Name on the command line.
        device_kind: Prefix of ``jax.Device.device_kind`` on this GPU.
        memory_bytes: Size of the whole memory; a process can allocate less.
        bandwidth: Memory bandwidth in bytes per second, from the data sheet.
        source: Origin of these numbers.
    """

    name: str
    device_kind: str
    memory_bytes: int
    bandwidth: int
    source: str


@functools.cache
def known_gpus() -> dict[str, GpuInfo]:
    """Returns the known GPUs by name."""
    text = resources.files("glm_jax.memory").joinpath("gpus.json").read_text(encoding="utf-8")
    return {name: GpuInfo(name=name, **fields) for name, fields in json.loads(text).items()}


def parse_gpus(text: str) -> tuple[GpuInfo, int]:
    """Parses ``NAME`` or ``NAMExN``, such as ``h100`` or ``b200x4``, into a GPU and a count.

    Raises:
        MemoryPlanError: if the GPU is unknown; the message lists the known names.
    """
    gpus = known_gpus()
    normalized = text.strip().lower()
    if normalized in gpus:
        return gpus[normalized], 1
    name, _, count = normalized.rpartition("x")
    if name in gpus and re.fullmatch(r"[1-9]\d{0,3}", count):
        return gpus[name], int(count)
    close = difflib.get_close_matches(normalized, gpus, 1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise MemoryPlanError(f"no card {text!r}{guess}; there are {', '.join(gpus)}; h100x4 means four")


def find_gpu(device_kind: str) -> GpuInfo | None:
    """Returns the known GPU with this ``jax.Device.device_kind``, ``None`` for other devices."""
    return next((gpu for gpu in known_gpus().values() if device_kind.startswith(gpu.device_kind)), None)


def device_bandwidth(device: Device) -> int | None:
    """Returns the memory bandwidth of a device in bytes per second, ``None`` unless it is a known GPU."""
    gpu = find_gpu(device.device_kind)
    return None if gpu is None else gpu.bandwidth


def available_device_memory(device: Device) -> int:
    """Returns the bytes that this process can still allocate on a device.

    On an accelerator this is JAX's share of the memory minus the bytes in use. On a CPU it is
    :func:`available_host_memory`.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return available_host_memory()


def available_host_memory() -> int:
    """Returns the bytes of main memory that are free or hold droppable file pages, within the container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if match := re.search(r"^MemAvailable:\s+(\d+) kB$", _read_text(_MEMINFO), re.MULTILINE):
        limits.append(int(match[1]) * 1024)
    return min([*limits, *_cgroup_headrooms()])


def peak_memory() -> tuple[int, str]:
    """Returns the peak memory use in bytes, and where it was measured.

    The peak is that of the first local device, named by its kind, if the device counts it. Otherwise it is the peak
    resident size of this process, and the name is "process"; where the system does not tell it, the result is 0 and
    "unknown".
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], device.device_kind
    if resource is None:
        return 0, "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process"


def uses_default_memory_fraction(device: Device) -> bool:
    """Returns whether JAX took only its default 75 % of a GPU because no environment variable says otherwise."""
    return device.platform != "cpu" and not any(name in os.environ for name in _MEMORY_FRACTION_VARIABLES)


def _cgroup_headrooms() -> list[int]:
    """Returns the bytes that each control group around this process still allows."""
    groups = [line.split(":", 2) for line in _read_text(_OWN_CGROUP).splitlines() if line.count(":") >= 2]
    headrooms = []
    for _, controllers, path in groups:
        if controllers == "":  # cgroup version 2
            root, limit, usage, file_pages = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            file_pages = "total_inactive_file"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            if (limit_bytes := _read_text(folder / limit).strip()).isdigit():
                headrooms.append(max(0, int(limit_bytes) - _cgroup_usage(folder, usage, file_pages)))
    return headrooms


def _cgroup_usage(folder: Path, usage: str, file_pages: str) -> int:
    """Returns the bytes that a control group uses, without the file pages that the kernel drops first."""
    used = _read_text(folder / usage).strip()
    droppable = re.search(rf"^{file_pages} (\d+)$", _read_text(folder / "memory.stat"), re.MULTILINE)
    return max(0, (int(used) if used.isdigit() else 0) - (int(droppable[1]) if droppable else 0))


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
