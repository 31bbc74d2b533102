"""What a figure was measured on: the device with its driver and clocks, versions, commit."""

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
# As nvidia-smi calls them: what of a card decides how fast it is.
_NVIDIA_SMI_FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "ecc.mode.current", "temperature.gpu", "clocks_event_reasons.active",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Device, processor, versions and commit, as they go into a report; ``gpu`` only where nvidia-smi is."""
    device = jax.devices()[0]
    facts = {
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "cpu": _cpu_name(),
        "cores": num_cpu_cores(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _package_version(name))},
        "commit": _git_commit(),
    }
    return facts | ({"gpu": gpu} if device.platform != "cpu" and (gpu := nvidia_smi()) else {})


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the first card, by its own names; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return (
        dict(zip(_NVIDIA_SMI_FIELDS, cells, strict=True))
        if len(cells) == len(_NVIDIA_SMI_FIELDS) and not done.returncode
        else {}
    )


def num_cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slugify(name: str) -> str:
    """A device's name as part of a file's: ``NVIDIA H200`` as ``nvidia-h200``."""
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
    """Commit of the checkout this package runs from, marked when files differ from it; ``None`` outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
