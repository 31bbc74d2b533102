"""Times the operations on a GPU with JAX's profiler."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import jax

_LOGGER = logging.getLogger(__name__)
_FIRST_GPU = "/device:GPU:0"
_STREAM = "Stream #"
_NUMERIC_SUFFIX = re.compile(r"([._]\d+)+$")


class OperationTime(TypedDict):
    """Time of all calls of one operation in a step.

    Attributes:
        name: Name of the operation, without XLA's numeric suffix.
        count: Calls per step.
        us: Microseconds per step.
    """

    name: str
    count: float
    us: float


class DeviceProfile(TypedDict):
    """Operations that the first GPU ran in a step.

    Attributes:
        launches: Operations per step.
        us: Microseconds per step.
        operations: Operations by name, the longest first.
    """

    launches: float
    us: float
    operations: list[OperationTime]


def profile_operations(run: Callable[[], object], steps: int) -> DeviceProfile | None:
    """Profiles a run. Returns ``None`` without a profile, and logs the reason if the profiler failed.

    Args:
        run: Runs the steps and waits for the device.
        steps: Number of steps in the run; times and counts are per step.
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
    except (RuntimeError, OSError, ValueError) as error:  # the profiler's library or permission is missing
        _LOGGER.warning("no operations: the profiler failed (%s)", str(error).partition("\n")[0])
        return None


def summarize_operations(data: Any, steps: int) -> DeviceProfile | None:
    """Sums up the operations on the streams of the first GPU; returns ``None`` if the profile holds no GPU.

    Args:
        data: Profile of a run, a :class:`jax.profiler.ProfileData`.
        steps: Number of steps in the run.
    """
    durations_us: dict[str, list[float]] = {}
    for plane in data.planes:
        if plane.name != _FIRST_GPU:
            continue
        # The other lines of the plane are totals over the streams.
        for line in (line for line in plane.lines if line.name.startswith(_STREAM)):
            for event in line.events:
                durations_us.setdefault(_NUMERIC_SUFFIX.sub("", event.name), []).append(event.duration_ns / 1e3)
    if not durations_us:
        return None
    operations: list[OperationTime] = [
        {"name": name, "count": len(us) / steps, "us": round(sum(us) / steps, 3)} for name, us in durations_us.items()
    ]
    operations.sort(key=lambda operation: -operation["us"])
    return {
        "launches": sum(operation["count"] for operation in operations),
        "us": round(sum(operation["us"] for operation in operations), 3),
        "operations": operations,
    }
