"""Triton kernels as operations of JAX: compiled to PTX, and launched by XLA itself.

A Triton kernel is compiled to PTX by the ``triton`` package, which needs no GPU, and embedded in the program as XLA's
own custom call for PTX. XLA then launches it like one of its own kernels: inside CUDA graphs, loops and manual regions,
with outputs that take the place of inputs. With ``TRITON_INTERPRET=1`` in the environment the same call runs in
Triton's interpreter on NumPy arrays instead, on any machine.

A kernel's parameters are inputs, then outputs, all of them pointers, then constants by name. Scalars that are not known
when tracing are arrays of one element.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import _device
from pallas_kernels._compile import CompileOptions as CompileOptions
from pallas_kernels._compile import LaunchError as LaunchError
from pallas_kernels._compile import compile_kernel, record_kernel
from pallas_kernels._compile import record_kernels as record_kernels
from pallas_kernels._interpreter import TRITON_DTYPES, interpret
from pallas_kernels._launch_backends import KernelLaunch, dispatch_launch

MIN_CAPABILITY = 80

# A loop as one CUDA graph, its condition evaluated on the device: the host starts it and hears of it when it is done.
# Without WHILE in the list the host would be asked after every round whether to go on.
CUDA_GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
# On several GPUs a round is a graph with the sums over devices in it, and the host goes round: what the library of
# these sums captures is not known to be allowed in the body of a loop.
MULTI_GPU_CUDA_GRAPH_OPTIONS = {
    **CUDA_GRAPH_OPTIONS,
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES",
}


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled at all."""
    return importlib.util.find_spec("triton") is not None


def kernels_available() -> bool:
    """Whether a program traced now can contain kernels: they need tensor cores that take bfloat16."""
    if not has_triton():
        return False
    target = None if is_interpreted() else _device.current_target()
    return is_interpreted() or (target is not None and target.capability >= MIN_CAPABILITY)


def launch(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    options: CompileOptions = CompileOptions(),
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a Triton kernel.

    Args:
        kernel: decorated with ``triton.jit``.
        inputs: arrays, in the order of its parameters.
        outputs: shapes and dtypes of the parameters behind these; their contents are undefined before the kernel.
        grid: programs along each of up to three axes.
        options: warps and stages.
        aliases: index of an input to that of the output that takes its place.
        **constants: the ``tl.constexpr`` parameters.

    Raises:
        LaunchError: without Triton, or without a GPU to compile for.
    """
    if not has_triton():
        raise LaunchError("kernels need the package triton: install glm-jax[cuda]")
    if is_interpreted():
        run = functools.partial(interpret, kernel, tuple(outputs), grid, constants, dict(aliases or {}))
        return list(_forbid_differentiation(run)(*inputs))
    target = _device.current_target()
    if target is None:
        raise LaunchError("kernels are compiled for a GPU, and JAX's default device is none")
    types = [TRITON_DTYPES[np.dtype(x.dtype).name] for x in (*inputs, *outputs)]
    compiled = compile_kernel(kernel, tuple(types), tuple(constants.items()), target.capability, options)
    if compiled.shared_memory > target.shared_memory:
        raise LaunchError(
            f"{compiled.name} needs {compiled.shared_memory} bytes of shared memory, {target.name} has "
            f"{target.shared_memory}"
        )
    record_kernel(compiled)
    what = KernelLaunch(
        kernel=kernel,
        compiled=compiled,
        capability=target.capability,
        options=options,
        outputs=tuple(outputs),
        grid=(*grid, 1, 1)[:3],
        aliases=dict(aliases or {}),
        constants=constants,
    )
    return list(_forbid_differentiation(functools.partial(dispatch_launch, what))(*inputs))


def check_counters(counters: jax.Array, needed: int) -> None:
    """Kernels that finish each other's work count in an array of zeros, and must not count beyond its end.

    Raises:
        LaunchError: if it is too short.
    """
    if counters.size < needed:
        raise LaunchError(f"{needed} blocks cannot be counted by {counters.size} counters")


def _forbid_differentiation(run: Callable[..., Any]) -> Callable[..., Any]:
    call: Any = jax.custom_jvp(run)

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise LaunchError("kernels have no derivative: load the model with kernels='reference'")

    return call
