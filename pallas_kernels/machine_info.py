"""Description of the machine that a figure was measured on: device, driver, clocks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "triton", "jax-triton", "flax", "numpy", "torch", "transformers")
# Properties of a GPU that decide its speed, by nvidia-smi's names.
_NVIDIA_SMI_FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "ecc.mode.current", "temperature.gpu", "clocks_event_reasons.active",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Returns device, processor, versions and commit for a report, and ``gpu`` if nvidia-smi is there."""
    device = jax.devices()[0]
    description = {
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "cpu": _cpu_name(),
        "cores": num_cpu_cores(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _package_version(name))},
        "commit": _git_commit(),
    }
    return description | ({"gpu": gpu} if device.platform != "cpu" and (gpu := nvidia_smi()) else {})


def nvidia_smi() -> dict[str, str]:
    """Returns nvidia-smi's properties of the first GPU, by its own names; empty if there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    cells = [cell.strip() for cell in result.stdout.strip().split(",")]
    return (
        dict(zip(_NVIDIA_SMI_FIELDS, cells, strict=True))
        if len(cells) == len(_NVIDIA_SMI_FIELDS) and not result.returncode
        else {}
    )


def num_cpu_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slugify(name: str) -> str:
    """Returns a device's name in a form for file names: ``NVIDIA H200`` as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the commit of this checkout, marked if files differ from it; ``None`` outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
