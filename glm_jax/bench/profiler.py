"""Which operations a device spends its time on, by JAX's profiler."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_DEVICE = "/device:GPU:"
_STREAM = "Stream #"
_NUMERIC_SUFFIX = re.compile(r"([._]\d+)+$")


def profile_operations(run: Callable[[], object], steps: int) -> dict[str, Any] | None:
    """Operations of a run by the time they take; None where the profiler does not tell.

    Args:
        run: runs, and waits for the device.
        steps: that it makes: times and counts are for one of them.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                run()
            files = sorted(Path(folder).rglob("*.xplane.pb"))
            return summarize_operations(jax.profiler.ProfileData.from_file(str(files[-1])), steps) if files else None
    except (RuntimeError, OSError, ValueError) as error:  # no library for it, or no right to use it
        print(f"no operations: the profiler failed ({str(error).partition(chr(10))[0]})", file=sys.stderr)
        return None


def summarize_operations(data: Any, steps: int) -> dict[str, Any] | None:
    """What the streams of the first GPU ran.

    Args:
        data: a :class:`jax.profiler.ProfileData`.
        steps: to divide by.

    Returns:
        ``launches`` and ``us`` of a step, and ``operations`` by name without the numbers that XLA gives them (name,
        count, microseconds; the longest first); None where there is nothing of a GPU.
    """
    found: dict[str, list[float]] = {}
    for plane in data.planes:
        if plane.name != f"{_DEVICE}0":
            continue
        for line in plane.lines:
            # Other lines sum up what is in these.
            if line.name.startswith(_STREAM):
                for event in line.events:
                    found.setdefault(_NUMERIC_SUFFIX.sub("", event.name), []).append(event.duration_ns / 1e3)
    if not found:
        return None
    rows = [{"name": name, "count": len(us) / steps, "us": round(sum(us) / steps, 3)} for name, us in found.items()]
    rows.sort(key=lambda row: -row["us"])
    return {
        "launches": sum(row["count"] for row in rows),
        "us": round(sum(row["us"] for row in rows), 3),
        "operations": rows,
    }
