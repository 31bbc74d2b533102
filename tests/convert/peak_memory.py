"""Runs one step and prints its peak memory: ``python -m tests.convert.peak_memory STEP SOURCE [DESTINATION [FORM …]]``.

Memory is RssAnon + RssShmem above the value after imports: pages of mapped files do not count.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from convert.pipeline import convert_checkpoint
from glm_jax import checkpoint
from glm_jax.checkpoint.sources.open import open_source


def resident_bytes() -> int:
    """Bytes of private and shared memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class PeakResidentMemory:
    """Highest memory while a block runs, sampled every few milliseconds."""

    def __enter__(self) -> "PeakResidentMemory":
        self.start = self.highest = resident_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.highest = max(self.highest, resident_bytes())
            time.sleep(0.003)


def load_checkpoint(source: str) -> int:
    """Loads in bfloat16; gives the checkpoint's size."""
    _, params, info = checkpoint.load(source, dtype="bfloat16")
    jax.block_until_ready(params)
    return checkpoint.open_source(info.name).total_bytes()


def main(
    step: str, source: str, destination: str = "", form: str = "orbax", quantize: str = "", method: str = "mse"
) -> None:
    """Prints bytes at the peak, of the weights, of the largest part, and the seconds it took."""
    import orbax.checkpoint  # noqa: F401  (imports are not part of the claim)
    import tensorstore  # noqa: F401

    jax.block_until_ready(jax.numpy.zeros(8))
    began = time.monotonic()
    with PeakResidentMemory() as peak:
        if step == "load":
            size = load_checkpoint(source)
        else:
            options: dict[str, Any] = {"to": form, "quantize": quantize or None, "method": method}
            size = convert_checkpoint(source, destination, **options).nbytes
    seconds = time.monotonic() - began
    weights = open_source(source)
    largest = max(sum(weights.nbytes(leaf) for leaf in members) for members in weights.layout().values())
    print(json.dumps({"peak": peak.highest - peak.start, "size": size, "part": largest, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
