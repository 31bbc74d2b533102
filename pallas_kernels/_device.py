"""What the device that a program is traced for can do; asked here and nowhere else."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Iterator

import jax

# Shared memory that one block may ask for, by compute capability (CUDA C++ programming guide, "Technical
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
        name: as JAX calls it (``device_kind``).
        capability: ten times the compute capability: 89 for 8.9.
        multiprocessors: number of them.
    """

    name: str
    capability: int
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may have; the least of all known ones for an unknown card."""
        return _SHARED_MEMORY_PER_BLOCK.get(self.capability, min(_SHARED_MEMORY_PER_BLOCK.values()))


_TARGET_OVERRIDE: contextvars.ContextVar[Target | None] = contextvars.ContextVar("glm_jax_target", default=None)


def current_target() -> Target | None:
    """The GPU to trace for: the one chosen by :func:`compiling_for`, else JAX's default device if that is one."""
    return _TARGET_OVERRIDE.get() or _detect_target()


def is_cross_compiling() -> bool:
    """Whether the target was chosen by :func:`compiling_for`, and need not be here."""
    return _TARGET_OVERRIDE.get() is not None


@contextlib.contextmanager
def compiling_for(override: Target) -> Iterator[None]:
    """Traces for a GPU that need not be here. Functions that were traced before keep the kernels of their time."""
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
    if version is None:  # a GPU that is not NVIDIA's
        return None
    return Target(device.device_kind, int(version[1] + version[2]), int(device.core_count))
