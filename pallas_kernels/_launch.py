"""Launches Triton kernels as operations of JAX: compiled to PTX, started by XLA itself.

The ``triton`` package compiles a kernel to PTX without a GPU, and the PTX is embedded in the program as XLA's own
custom call. XLA then treats it like one of its own kernels: inside CUDA graphs, loops and manual regions, with outputs
that alias inputs. With ``TRITON_INTERPRET=1`` in the environment the same call runs in Triton's interpreter on NumPy
arrays instead, on any machine.

A kernel's parameters are its inputs, then its outputs, all of them pointers, then its ``tl.constexpr`` parameters. A
launch names all of them. Scalars that are unknown when tracing are arrays of one element. Parameters that belong
together travel as one constexpr: a frozen dataclass, whose fields the kernel reads as attributes. Pointers stay
parameters of their own, because jax-triton takes no tuples of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pallas_kernels import _device
from pallas_kernels._compile import CompileOptions as CompileOptions
from pallas_kernels._compile import compile_kernel, record_kernel
from pallas_kernels._compile import record_kernels as record_kernels
from pallas_kernels._interpreter import TRITON_DTYPES, interpret
from pallas_kernels._kernel import Constant, Operands, TritonKernel
from pallas_kernels._kernel import KernelModule as KernelModule
from pallas_kernels._kernel import LaunchError as LaunchError
from pallas_kernels._launch_backends import KernelLaunch, dispatch_launch

MIN_CAPABILITY = 80  # the first with tensor cores that take bfloat16

# A loop becomes one CUDA graph whose condition is evaluated on the device: the host starts it and hears from it when it
# is done. Without WHILE in the list the host would decide after every iteration whether to continue.
CUDA_GRAPH_OPTIONS: dict[str, str | int] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
# On several GPUs an iteration is a graph that includes its collectives, and the host runs the loop: it is not known
# whether the graph nodes of the collective library are allowed in the body of a conditional graph node.
MULTI_GPU_CUDA_GRAPH_OPTIONS: dict[str, str | int] = {
    **CUDA_GRAPH_OPTIONS,
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES",
}


def is_interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Returns whether the package that compiles kernels is installed."""
    return importlib.util.find_spec("triton") is not None


def kernels_available() -> bool:
    """Returns whether a program traced now can contain kernels."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Returns why a program traced now cannot contain kernels, or ``None`` if it can."""
    if not has_triton():
        return "kernels need the package triton: install glm-jax[cuda]"
    if is_interpreted():
        return None
    target = _device.current_target()
    if target is None:
        return "kernels are compiled for a GPU, and JAX's default device is none"
    if target.capability < MIN_CAPABILITY:
        return f"kernels need compute capability {MIN_CAPABILITY / 10} or more, and {target.name} has less"
    return None


def launch(
    kernel: TritonKernel,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    constants: Mapping[str, Constant],
    *,
    grid: tuple[int, ...],
    options: CompileOptions = CompileOptions(),
    aliases: Mapping[str, str] | None = None,
) -> dict[str, jax.Array]:
    """Runs a Triton kernel.

    Args:
        kernel: Function decorated with ``triton.jit``.
        inputs: Arrays by the names of the kernel's input parameters.
        outputs: Shapes and dtypes by the names of its output parameters, which follow the inputs in its signature.
            The contents of an output are undefined before the kernel runs.
        constants: Values by the names of its ``tl.constexpr`` parameters.
        grid: Number of programs along each of up to three axes.
        options: Warps and pipeline stages.
        aliases: Name of an input to the name of the output that reuses its memory.

    Returns:
        The arrays by the names of the output parameters.

    Raises:
        LaunchError: If the names do not match the kernel's signature, Triton is missing, there is no GPU to compile
            for, or the kernel needs more shared memory than the GPU has.
    """
    if not has_triton():
        raise LaunchError("kernels need the package triton: install glm-jax[cuda]")
    operands = _bind_operands(kernel, inputs, outputs, constants, dict(aliases or {}))
    arrays = [inputs[name] for name in operands.inputs]
    if is_interpreted():
        run = functools.partial(interpret, kernel, operands, grid, dict(constants))
    else:
        run = functools.partial(dispatch_launch, _compile_launch(kernel, operands, arrays, constants, grid, options))
    return dict(zip(operands.outputs, _forbid_differentiation(run)(*arrays), strict=True))


def _bind_operands(
    kernel: TritonKernel,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    constants: Mapping[str, Constant],
    aliases: Mapping[str, str],
) -> Operands:
    """Puts operands in the order of the kernel's signature, after checking every name.

    Raises:
        LaunchError: If a name is missing, unknown or out of place.
    """
    for name, constant in constants.items():
        # Triton reads these two attributes of the constexpr itself, and silently so.
        if dataclasses.is_dataclass(constant) and {"value", "type"} & {f.name for f in dataclasses.fields(constant)}:
            raise LaunchError(f"the fields of the constant {name} cannot be called value or type")
    names = list(kernel.arg_names)
    provided = [*inputs, *outputs, *constants]
    if sorted(names) != sorted(provided):
        missing, unknown = sorted(set(names) - set(provided)), sorted(set(provided) - set(names))
        raise LaunchError(f"operands do not match the kernel: missing {missing}, unknown {unknown}")
    pointers = [name for name in names if name not in constants]
    if any(name in outputs for name in pointers[: len(inputs)]):
        raise LaunchError("a kernel's outputs must follow its inputs")
    if wrong := [f"{i} -> {o}" for i, o in aliases.items() if i not in inputs or o not in outputs]:
        raise LaunchError(f"an alias is from an input to an output, and {', '.join(wrong)} is not")
    return Operands(
        inputs=tuple(pointers[: len(inputs)]),
        outputs={name: outputs[name] for name in pointers[len(inputs) :]},
        aliases=aliases,
    )


def _compile_launch(
    kernel: TritonKernel,
    operands: Operands,
    arrays: list[jax.Array],
    constants: Mapping[str, Constant],
    grid: tuple[int, ...],
    options: CompileOptions,
) -> KernelLaunch:
    """Compiles a kernel for the current target."""
    target = _device.current_target()
    if target is None:
        raise LaunchError("kernels are compiled for a GPU, and JAX's default device is none")
    dtypes = {
        **{name: array.dtype for name, array in zip(operands.inputs, arrays, strict=True)},
        **{name: output.dtype for name, output in operands.outputs.items()},
    }
    element_types = tuple((name, TRITON_DTYPES[np.dtype(dtype).name]) for name, dtype in dtypes.items())
    compiled = compile_kernel(kernel, element_types, tuple(constants.items()), target.capability, options)
    if compiled.shared_memory > target.shared_memory:
        raise LaunchError(
            f"{compiled.name} needs {compiled.shared_memory} bytes of shared memory, {target.name} has "
            f"{target.shared_memory}"
        )
    record_kernel(compiled)
    return KernelLaunch(
        kernel=kernel,
        compiled=compiled,
        capability=target.capability,
        options=options,
        operands=operands,
        grid=(*grid, 1, 1)[:3],
        constants=dict(constants),
    )


def check_counters(counters: jax.Array, needed: int) -> None:
    """Checks that the zeros in which programs count their arrivals are enough.

    Raises:
        LaunchError: If there are fewer counters than blocks.
    """
    if counters.size < needed:
        raise LaunchError(f"{needed} blocks cannot be counted by {counters.size} counters")


def _forbid_differentiation(run: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    call: Any = jax.custom_jvp(run)

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise LaunchError("kernels have no derivative: load the model with kernels='reference'")

    return call
