"""Triton kernels as operations of JAX: compiled to PTX, and launched by XLA itself.

A Triton kernel is compiled to PTX by the ``triton`` package, which needs no GPU, and embedded in the program as XLA's
own custom call for PTX. XLA then launches it like one of its own kernels: inside CUDA graphs, loops and manual regions,
with outputs that take the place of inputs. With ``TRITON_INTERPRET=1`` in the environment the same call runs in
Triton's interpreter on NumPy arrays instead, on any machine.

A kernel's parameters are inputs, then outputs, all of them pointers, then constants by name. Scalars that are not known
when tracing are arrays of one element.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import _device
from pallas_kernels._interpreter import TYPES, interpret

LEAST_CAPABILITY = 80
PTX_CALL = "__gpu$xla.gpu.ptx"

# A loop as one CUDA graph, its condition evaluated on the device: the host starts it and hears of it when it is done.
# Without WHILE in the list the host would be asked after every round whether to go on.
GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
# On several GPUs a round is a graph with the sums over devices in it, and the host goes round: what the library of
# these sums captures is not known to be allowed in the body of a loop.
GRAPH_OPTIONS_OF_SEVERAL = {
    **GRAPH_OPTIONS,
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES",
}


class LaunchError(Exception):
    """A kernel cannot be compiled or launched here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a kernel is compiled.

    Attributes:
        num_warps: of 32 threads, per program.
        num_stages: of its loads in flight.
    """

    num_warps: int = 4
    num_stages: int = 3


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled at all."""
    return importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether a program traced now can contain kernels: they need tensor cores that take bfloat16."""
    if not has_triton():
        return False
    target = None if interpreted() else _device.target()
    return interpreted() or (target is not None and target.capability >= LEAST_CAPABILITY)


def launch(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    shape: Shape = Shape(),
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a Triton kernel.

    Args:
        kernel: decorated with ``triton.jit``.
        inputs: arrays, in the order of its parameters.
        outputs: shapes and dtypes of the parameters behind these; their contents are undefined before the kernel.
        grid: programs along each of up to three axes.
        shape: warps and stages.
        aliases: index of an input to that of the output that takes its place.
        **constants: the ``tl.constexpr`` parameters.

    Raises:
        LaunchError: without Triton, or without a GPU to compile for.
    """
    if not has_triton():
        raise LaunchError("kernels need the package triton: install glm-jax[cuda]")
    if interpreted():
        run = functools.partial(interpret, kernel, tuple(outputs), grid, constants, dict(aliases or {}))
        return list(_not_differentiable(run)(*inputs))
    target = _device.target()
    if target is None:
        raise LaunchError("kernels are compiled for a GPU, and JAX's default device is none")
    types = [TYPES[np.dtype(x.dtype).name] for x in (*inputs, *outputs)]
    compiled = compile_kernel(kernel, tuple(types), tuple(constants.items()), target.capability, shape)
    if compiled.shared_memory > target.shared_memory:
        raise LaunchError(
            f"{compiled.name} needs {compiled.shared_memory} bytes of shared memory, {target.name} has "
            f"{target.shared_memory}"
        )
    if (record := _RECORD.get()) is not None:
        record.append(compiled)
    sizes = (*grid, 1, 1)[:3]
    number = np.int32
    call = jax.ffi.ffi_call(PTX_CALL, list(outputs), input_output_aliases=dict(aliases or {}))
    run = functools.partial(
        call,
        name=compiled.name,
        kernel_type="ptx",
        kernel_data=compiled.ptx,
        grid_x=number(sizes[0]),
        grid_y=number(sizes[1]),
        grid_z=number(sizes[2]),
        block_x=number(32 * compiled.num_warps),
        block_y=number(1),
        block_z=number(1),
        shared_mem_bytes=number(compiled.shared_memory),
        output_indices=tuple(number(len(inputs) + i) for i in range(len(outputs))),
    )
    # Triton adds two pointers to scratch memory, which no kernel here uses.
    return list(_not_differentiable(run)(*inputs, inputs[0], inputs[0]))


def _not_differentiable(run: Callable[..., Any]) -> Callable[..., Any]:
    call: Any = jax.custom_jvp(run)

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise LaunchError("kernels have no derivative: load the model with kernels='reference'")

    return call


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
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


_RECORD: contextvars.ContextVar[list[Compiled] | None] = contextvars.ContextVar("glm_jax_kernels", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Compiled]]:
    """Collects the kernels of every launch that is traced meanwhile."""
    made: list[Compiled] = []
    token = _RECORD.set(made)
    try:
        yield made
    finally:
        _RECORD.reset(token)


@functools.cache
def compile_kernel(
    kernel: Any, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], capability: int, shape: Shape
) -> Compiled:
    """Compiles a kernel for a compute capability; needs no GPU.

    Args:
        kernel: decorated with ``triton.jit``.
        types: element types of its pointers, as Triton names them.
        constants: its other parameters.
        capability: 89 for 8.9.
        shape: warps and stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(constants)
    pointers = [name for name in kernel.arg_names if name not in given]
    kinds = dict(zip(pointers, (f"*{kind}" for kind in types), strict=True))
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    # XLA places every array at a multiple of 128 bytes or more.
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": shape.num_warps, "num_stages": shape.num_stages},
    )
    facts = made.metadata
    if facts.global_scratch_size:
        raise LaunchError(f"{facts.name} asks for scratch memory, which nothing here provides")
    return Compiled(facts.name, made.asm["ptx"], facts.num_warps, facts.shared, made.asm["cubin"])
