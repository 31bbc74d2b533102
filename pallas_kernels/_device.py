"""Capabilities of the GPU that a program is traced for. No other module asks the device."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Iterator

import jax

# Shared memory that one block may request, by compute capability (CUDA C++ programming guide, "Technical
# specifications per compute capability").
_SHARED_MEMORY_PER_BLOCK = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A GPU that kernels are compiled for.

    Attributes:
        name: JAX's name of the device (``device_kind``).
        capability: Ten times the compute capability: 89 for 8.9.
        multiprocessors: Number of streaming multiprocessors.
    """

    name: str
    capability: int
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may request; the smallest known limit for an unknown capability."""
        return _SHARED_MEMORY_PER_BLOCK.get(self.capability, min(_SHARED_MEMORY_PER_BLOCK.values()))


_TARGET_OVERRIDE: contextvars.ContextVar[Target | None] = contextvars.ContextVar("glm_jax_target", default=None)


def current_target() -> Target | None:
    """Returns the GPU to trace for: that of :func:`compiling_for`, else JAX's default device if it is a GPU."""
    return _TARGET_OVERRIDE.get() or _detect_target()


def is_cross_compiling() -> bool:
    """Returns whether :func:`compiling_for` chose the target, which may then be absent from this machine."""
    return _TARGET_OVERRIDE.get() is not None


@contextlib.contextmanager
def compiling_for(override: Target) -> Iterator[None]:
    """Traces for a GPU that may be absent. Functions traced earlier keep the kernels they were traced with."""
    token = _TARGET_OVERRIDE.set(override)
    try:
        yield
    finally:
        _TARGET_OVERRIDE.reset(token)


@functools.cache
def _detect_target() -> Target | None:
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    device = jax.devices()[0]
    version = re.fullmatch(r"(\d+)\.(\d)", str(device.compute_capability))
    if version is None:  # a GPU of another vendor
        return None
    return Target(device.device_kind, int(version[1] + version[2]), int(device.core_count))
