"""What devices offer: memory and bandwidth of those at hand, and of cards that are not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from glm_jax.errors import MemoryPlanError

Device = Any  # what jax.devices() lists

_MEMINFO, _CGROUPS, _OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMORY_FRACTION_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuInfo:
    """A card.

    Attributes:
        name: as commands take it.
        device_kind: how JAX's name for it begins.
        memory_bytes: all of it; a process gets less.
        bandwidth: of the memory, bytes per second, by the data sheet.
        source: of the numbers.
    """

    name: str
    device_kind: str
    memory_bytes: int
    bandwidth: int
    source: str


@functools.cache
def known_gpus() -> dict[str, GpuInfo]:
    """The known cards by name."""
    text = resources.files("glm_jax.memory").joinpath("gpus.json").read_text(encoding="utf-8")
    return {name: GpuInfo(name=name, **fields) for name, fields in json.loads(text).items()}


def parse_gpus(text: str) -> tuple[GpuInfo, int]:
    """Reads ``NAME`` or ``NAMExN``, as in ``h100`` or ``b200x4``.

    Raises:
        MemoryPlanError: listing the names there are.
    """
    wanted = text.strip().lower()
    if wanted in known_gpus():
        return known_gpus()[wanted], 1
    name, _, count = wanted.rpartition("x")
    if name in known_gpus() and re.fullmatch(r"[1-9]\d{0,3}", count):
        return known_gpus()[name], int(count)
    close = difflib.get_close_matches(wanted, known_gpus(), 1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise MemoryPlanError(f"no card {text!r}{guess}; there are {', '.join(known_gpus())}; h100x4 means four")


def device_bandwidth(device: Device) -> int | None:
    """Memory bandwidth in bytes per second of a device at hand, if it is one of the known cards."""
    return next(
        (gpu.bandwidth for gpu in known_gpus().values() if device.device_kind.startswith(gpu.device_kind)), None
    )


def available_device_memory(device: Device) -> int:
    """Bytes that this process may still take on a device.

    On an accelerator JAX's share of its memory less what is in use; on a CPU the memory the machine has available.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return available_host_memory()


def available_host_memory() -> int:
    """Bytes of main memory that are free, or would be without cached files; at most what a container leaves."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if found := re.search(r"^MemAvailable:\s+(\d+) kB$", _read_text(_MEMINFO), re.MULTILINE):
        limits.append(int(found[1]) * 1024)
    return min([*limits, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Bytes left in each control group that this process is in."""
    groups = [line.split(":", 2) for line in _read_text(_OWN_CGROUP).splitlines() if line.count(":") >= 2]
    left = []
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            root, limit, usage, files = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = "total_inactive_file"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            if (most := _read_text(folder / limit).strip()).isdigit():
                left.append(max(0, int(most) - _cgroup_usage(folder, usage, files)))
    return left


def _cgroup_usage(folder: Path, usage: str, files: str) -> int:
    """Bytes that a control group uses, without the file pages that would be dropped first."""
    used = _read_text(folder / usage).strip()
    dropped = re.search(rf"^{files} (\d+)$", _read_text(folder / "memory.stat"), re.MULTILINE)
    return max(0, (int(used) if used.isdigit() else 0) - (int(dropped[1]) if dropped else 0))


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def uses_default_memory_fraction(device: Device) -> bool:
    """Whether JAX took only its default 75 % of this device's memory, because nothing told it otherwise."""
    return device.platform != "cpu" and not any(name in os.environ for name in _MEMORY_FRACTION_VARIABLES)
