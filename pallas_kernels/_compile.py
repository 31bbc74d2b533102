"""Triton kernels compiled to PTX, which needs no GPU."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels._cache_dirs import private_cache_dir


class LaunchError(Exception):
    """A kernel cannot be compiled or launched here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """How a kernel is compiled.

    Attributes:
        num_warps: of 32 threads, per program.
        num_stages: of its loads in flight.
    """

    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel for one kind of GPU.

    Attributes:
        name: of its entry.
        ptx: its text.
        num_warps: per program.
        shared_memory: bytes per program.
        cubin: the binary that Triton's own assembler made of it, for inspection.
    """

    name: str
    ptx: str
    num_warps: int
    shared_memory: int
    cubin: bytes


_TRITON_LOCK = threading.RLock()  # Triton's are the process's
_RECORDED_KERNELS: contextvars.ContextVar[list[CompiledKernel] | None] = contextvars.ContextVar(
    "glm_jax_kernels", default=None
)


@contextlib.contextmanager
def record_kernels() -> Iterator[list[CompiledKernel]]:
    """Collects the kernels of every launch that is traced meanwhile."""
    made: list[CompiledKernel] = []
    token = _RECORDED_KERNELS.set(made)
    try:
        yield made
    finally:
        _RECORDED_KERNELS.reset(token)


def record_kernel(kernel: CompiledKernel) -> None:
    """Hands a kernel to :func:`record_kernels`, if that is on."""
    if (made := _RECORDED_KERNELS.get()) is not None:
        made.append(kernel)


@functools.cache
def compile_kernel(
    kernel: Any,
    element_types: tuple[str, ...],
    constants: tuple[tuple[str, Any], ...],
    capability: int,
    options: CompileOptions,
) -> CompiledKernel:
    """Compiles a kernel for a compute capability; needs no GPU.

    Args:
        kernel: decorated with ``triton.jit``.
        element_types: element types of its pointers, as Triton names them.
        constants: its other parameters.
        capability: 89 for 8.9.
        options: warps and stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(constants)
    pointers = [name for name in kernel.arg_names if name not in given]
    kinds = dict(zip(pointers, (f"*{kind}" for kind in element_types), strict=True))
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    # XLA places every array at a multiple of 128 bytes or more.
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    with private_triton_cache():
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": options.num_warps, "num_stages": options.num_stages},
        )
    facts = made.metadata
    if facts.global_scratch_size:
        raise LaunchError(f"{facts.name} asks for scratch memory, which nothing here provides")
    return CompiledKernel(facts.name, made.asm["ptx"], facts.num_warps, facts.shared, made.asm["cubin"])


@contextlib.contextmanager
def private_triton_cache() -> Iterator[Path | None]:
    """Triton keeps what it compiles in a folder of the user's that nobody else can write to, and in none without one.

    A place that the environment names (TRITON_CACHE_DIR, TRITON_HOME) is the user's choice, and stays.
    """
    import triton.knobs

    if any(os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TRITON_HOME")):
        yield None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_TRITON_LOCK)
        try:
            folder = private_cache_dir("triton")
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = str(folder)
        yield folder
