"""``python -m glm_jax.bench.short NAME FOLDER``: short benchmarks of a few minutes each, which ``make gpu`` runs.

The most informative cases come first, and the report is on disk after each case. Nothing beyond the packages that the
model itself needs has to be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from glm_jax.bench.options import DecodeOptions, PrefillOptions
from glm_jax.bench.run import measure_and_print
from glm_jax.cli.common import run_and_exit
from glm_jax.errors import GlmError

_FLASH = "synthetic:flash?mtp=0"


def short_benchmarks(out: Path) -> dict[str, DecodeOptions | PrefillOptions]:
    """Returns the benchmarks by name; their reports go into the folder ``out``."""
    return {
        "decode": DecodeOptions(
            model=_FLASH, quantize="int4", batch="1,8,32", context="1k,8k", tokens=64, repeats=5, out=out
        ),
        "prefill": PrefillOptions(model=_FLASH, quantize="int4", batch="1", lengths="1k,8k", repeats=3, out=out),
    }  # fmt: skip


def main() -> int:
    """Runs one benchmark and returns the exit code.

    Raises:
        GlmError: if the arguments are not a name and a folder.
    """
    names = short_benchmarks(Path())
    if len(sys.argv) != 3 or sys.argv[1] not in names:
        raise GlmError(f"usage: python -m glm_jax.bench.short {'|'.join(names)} FOLDER")
    return measure_and_print(short_benchmarks(Path(sys.argv[2]))[sys.argv[1]])


if __name__ == "__main__":
    run_and_exit(main)
