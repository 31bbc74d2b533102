"""``python -m glm_jax.bench.short NAME FOLDER``: the short sets that ``make gpu`` runs, each within minutes.

The cases that tell most come first, and the report is on disk after each of them. Needs no package but those that the
model itself needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from glm_jax.bench.options import DecodeOptions, PrefillOptions
from glm_jax.cli.common import run_and_exit
from glm_jax.errors import GlmError

_FLASH = "synthetic:flash?mtp=0"


def benchmark_sets(out: Path) -> dict[str, DecodeOptions | PrefillOptions]:
    """The sets by name; their reports go into ``out``."""
    return {
        "decode": DecodeOptions(
            model=_FLASH, quantize="int4", batch="1,8,32", context="1k,8k", tokens=64, repeats=5, out=out
        ),
        "prefill": PrefillOptions(model=_FLASH, quantize="int4", batch="1", lengths="1k,8k", repeats=3, out=out),
    }  # fmt: skip


def main() -> int:
    """Runs one set; returns its exit code."""
    names = benchmark_sets(Path())
    if len(sys.argv) != 3 or sys.argv[1] not in names:
        raise GlmError(f"usage: python -m glm_jax.bench.short {'|'.join(names)} FOLDER")
    from glm_jax.bench.run import measure_and_print

    return measure_and_print(benchmark_sets(Path(sys.argv[2]))[sys.argv[1]])


if __name__ == "__main__":
    run_and_exit(main)
