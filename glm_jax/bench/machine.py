"""What a figure was measured on: processor, versions, commit, memory bandwidth, memory in use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
_READ_BYTES, _READ_WIDTH = 1 << 30, 4096


def describe() -> dict[str, Any]:
    """Device, processor, cores, how busy they are, versions and commit, as they go into a report."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "cpu": _cpu_name(),
        "cores": cores(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def cores() -> int:
    """Cores this process may use; both sides get as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes per second at which all cores together read one GiB from memory (the best of ``repeats``).

    They multiply a matrix and a vector, which keeps up with memory better than anything else in NumPy.
    """
    parts = np.array_split(np.ones((_READ_BYTES // 4 // _READ_WIDTH, _READ_WIDTH), np.float32), cores())
    vector = np.ones(_READ_WIDTH, np.float32)
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda part: part @ vector, parts))
            best = min(best, time.perf_counter() - started)
    return _READ_BYTES / best


class PeakMemory:
    """The most memory a ``with`` block used above what was in use at its start, sampled every 5 ms.

    Counts anonymous and shared pages, not those of mapped files (RssAnon + RssShmem of ``/proc/self/status``).

    Attributes:
        peak: bytes, or ``None`` where there is no ``/proc``.
    """

    peak: int | None = None

    def __enter__(self) -> Self:
        self._start = resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._start is not None:
            self.peak = max(self.peak or 0, (resident() or 0) - self._start)
            if self._ended.wait(0.005):
                return


def resident() -> int | None:
    """Bytes of this process's own pages, or ``None`` where that is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package runs from, marked when files differ from it; ``None`` outside of one."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
