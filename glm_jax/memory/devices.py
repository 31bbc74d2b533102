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

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
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
def gpus() -> dict[str, Gpu]:
    """The known cards by name."""
    text = resources.files("glm_jax.memory").joinpath("gpus.json").read_text(encoding="utf-8")
    return {name: Gpu(name=name, **fields) for name, fields in json.loads(text).items()}


def find_gpus(text: str) -> tuple[Gpu, int]:
    """Reads ``NAME`` or ``NAMExN``, as in ``h100`` or ``b200x4``.

    Raises:
        MemoryPlanError: listing the names there are.
    """
    wanted = text.strip().lower()
    if wanted in gpus():
        return gpus()[wanted], 1
    name, _, count = wanted.rpartition("x")
    if name in gpus() and re.fullmatch(r"[1-9]\d{0,3}", count):
        return gpus()[name], int(count)
    close = difflib.get_close_matches(wanted, gpus(), 1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise MemoryPlanError(f"no card {text!r}{guess}; there are {', '.join(gpus())}; h100x4 means four")


def bandwidth_of(device: Device) -> int | None:
    """Memory bandwidth in bytes per second of a device at hand, if it is one of the known cards."""
    return next((gpu.bandwidth for gpu in gpus().values() if device.device_kind.startswith(gpu.device_kind)), None)


def device_limit(device: Device) -> int:
    """Bytes that this process may still take on a device.

    On an accelerator JAX's share of its memory less what is in use; on a CPU the memory the machine has available.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return available_memory()


def available_memory() -> int:
    """Bytes of main memory that are free, or would be if files were dropped from it; at most the container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if _MEMINFO.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
        limits += [int(found[1]) * 1024] if found else []
    if _CGROUP.exists() and (limit := _CGROUP.read_text().strip()).isdigit():
        limits.append(int(limit))
    return min(limits)


def has_default_share(device: Device) -> bool:
    """Whether JAX took only its default 75 % of this device's memory, because nothing told it otherwise."""
    return device.platform != "cpu" and not any(name in os.environ for name in _FRACTIONS)
