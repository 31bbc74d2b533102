"""Measures memory bandwidth, and the host memory that this process uses."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypedDict

import jax
import numpy as np

from pallas_kernels import timing
from pallas_kernels.machine_info import num_cpu_cores

_READ_BYTES, _READ_WIDTH = 1 << 30, 4096
_SAMPLE_SECONDS = 0.005


class MeasuredBandwidth(TypedDict):
    """Measured memory bandwidth.

    Attributes:
        bytes_per_s: Bytes per second.
        of: What was measured.
    """

    bytes_per_s: float
    of: str


def measure_bandwidth() -> MeasuredBandwidth:
    """Measures the memory bandwidth of JAX's default device."""
    if jax.default_backend() == "cpu":
        return {"bytes_per_s": measure_read_bandwidth(), "of": "reads by all cores"}
    return {"bytes_per_s": timing.measure_copy_bandwidth(), "of": "copies, read and written"}


def measure_read_bandwidth(repeats: int = 5) -> float:
    """Returns the bytes per second at which all cores together read one GiB from memory, the best of ``repeats`` runs.

    The cores multiply a matrix with a vector, the NumPy operation that comes closest to the bandwidth.
    """
    blocks = np.array_split(np.ones((_READ_BYTES // 4 // _READ_WIDTH, _READ_WIDTH), np.float32), num_cpu_cores())
    vector = np.ones(_READ_WIDTH, np.float32)
    best = float("inf")
    with ThreadPoolExecutor(len(blocks)) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda block: block @ vector, blocks))
            best = min(best, time.perf_counter() - started)
    return _READ_BYTES / best


class PeakMemoryMonitor:
    """Context manager that samples host memory every 5 ms and keeps its peak above the level at the start.

    It counts anonymous and shared pages (RssAnon + RssShmem of ``/proc/self/status``), not pages of mapped files.

    Attributes:
        peak: Bytes, ``None`` on systems without ``/proc``.
    """

    peak: int | None = None

    def __enter__(self) -> Self:
        self._start_bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while self._start_bytes is not None:
            self.peak = max(self.peak or 0, (resident_bytes() or 0) - self._start_bytes)
            if self._stop.wait(_SAMPLE_SECONDS):
                return


def resident_bytes() -> int | None:
    """Returns the bytes of this process's anonymous and shared pages, ``None`` on systems without ``/proc``."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
