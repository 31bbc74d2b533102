"""Compiles Triton kernels to PTX, which needs no GPU."""

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
from types import ModuleType

from pallas_kernels._cache_dirs import private_cache_dir
from pallas_kernels._kernel import Constant, LaunchError, TritonKernel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Compiler options of a kernel.

    Attributes:
        num_warps: Warps of 32 threads in a program.
        num_stages: Stages of the software pipeline that loads operands ahead.
    """

    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel compiled for one compute capability.

    Attributes:
        name: Name of its entry point.
        ptx: PTX text.
        num_warps: Warps of 32 threads in a program.
        shared_memory: Bytes of shared memory in a program.
        cubin: Binary from Triton's own assembler, for inspection.
    """

    name: str
    ptx: str
    num_warps: int
    shared_memory: int
    cubin: bytes


_TRITON_LOCK = threading.RLock()  # Triton's settings are global to the process
_RECORDED_KERNELS: contextvars.ContextVar[list[CompiledKernel] | None] = contextvars.ContextVar(
    "glm_jax_kernels", default=None
)


@contextlib.contextmanager
def record_kernels() -> Iterator[list[CompiledKernel]]:
    """Collects the kernel of every launch traced within the context, in order."""
    recorded: list[CompiledKernel] = []
    token = _RECORDED_KERNELS.set(recorded)
    try:
        yield recorded
    finally:
        _RECORDED_KERNELS.reset(token)


def record_kernel(kernel: CompiledKernel) -> None:
    """Adds a kernel to the list of an active :func:`record_kernels`."""
    if (recorded := _RECORDED_KERNELS.get()) is not None:
        recorded.append(kernel)


@functools.cache
def compile_kernel(
    kernel: TritonKernel,
    element_types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Constant], ...],
    capability: int,
    options: CompileOptions,
) -> CompiledKernel:
    """Compiles a kernel for a compute capability, without a GPU.

    Args:
        kernel: Function decorated with ``triton.jit``.
        element_types: Names of the pointer parameters, each with Triton's name of its element type.
        constants: Names and values of the ``tl.constexpr`` parameters.
        capability: Ten times the compute capability: 89 for 8.9.
        options: Warps and pipeline stages.

    Raises:
        LaunchError: If the kernel needs scratch memory.
    """
    compiler = _import_triton().compiler.compiler
    pointer_types = {name: f"*{element_type}" for name, element_type in element_types}
    signature = {name: pointer_types.get(name, "constexpr") for name in kernel.arg_names}
    # XLA aligns every array to 128 bytes or more.
    attributes = {(list(kernel.arg_names).index(name),): [["tt.divisibility", 16]] for name in pointer_types}
    with private_triton_cache():
        compiled = compiler.compile(
            compiler.ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes),
            target=compiler.GPUTarget("cuda", capability, 32),
            options={"num_warps": options.num_warps, "num_stages": options.num_stages},
        )
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise LaunchError(f"{metadata.name} asks for scratch memory, which nothing here provides")
    return CompiledKernel(
        metadata.name, compiled.asm["ptx"], metadata.num_warps, metadata.shared, compiled.asm["cubin"]
    )


@contextlib.contextmanager
def private_triton_cache() -> Iterator[Path | None]:
    """Points Triton's cache at a folder that only the user can write to, or at a temporary one if there is none.

    A folder named by the environment (TRITON_CACHE_DIR, TRITON_HOME) is the user's choice and stays.
    """
    if any(os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TRITON_HOME")):
        yield None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_TRITON_LOCK)
        try:
            folder = private_cache_dir("triton")
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        knobs = _import_triton().knobs
        stack.enter_context(knobs.cache.scope())
        knobs.cache.dir = str(folder)
        yield folder


def _import_triton() -> ModuleType:
    import triton  # optional: the extra "cuda"

    return triton
