"""What a figure was measured on, and what this process takes of it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from pallas_kernels import timing
from pallas_kernels.machine_info import num_cpu_cores

_READ_BYTES, _READ_WIDTH = 1 << 30, 4096


def measure_bandwidth() -> dict[str, Any]:
    """Bytes per second that the memory of JAX's default device gives, and how that was found."""
    import jax

    if jax.default_backend() == "cpu":
        return {"bytes_per_s": measure_read_bandwidth(), "of": "reads by all cores"}
    return {"bytes_per_s": timing.measure_copy_bandwidth(), "of": "copies, read and written"}


def measure_read_bandwidth(repeats: int = 5) -> float:
    """Bytes per second at which all cores together read one GiB from memory (the best of ``repeats``).

    They multiply a matrix and a vector, which keeps up with memory better than anything else in NumPy.
    """
    parts = np.array_split(np.ones((_READ_BYTES // 4 // _READ_WIDTH, _READ_WIDTH), np.float32), num_cpu_cores())
    vector = np.ones(_READ_WIDTH, np.float32)
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda part: part @ vector, parts))
            best = min(best, time.perf_counter() - started)
    return _READ_BYTES / best


class PeakMemoryMonitor:
    """The most memory a ``with`` block used above what was in use at its start, sampled every 5 ms.

    Counts anonymous and shared pages, not those of mapped files (RssAnon + RssShmem of ``/proc/self/status``).

    Attributes:
        peak: bytes, or ``None`` where there is no ``/proc``.
    """

    peak: int | None = None

    def __enter__(self) -> Self:
        self._start = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._start is not None:
            self.peak = max(self.peak or 0, (resident_bytes() or 0) - self._start)
            if self._ended.wait(0.005):
                return


def resident_bytes() -> int | None:
    """Bytes of this process's own pages, or ``None`` where that is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
