"""Embeds a kernel in a program: through XLA's own custom call for PTX, or through jax-triton where that fails.

The custom call is internal to XLA, so it is probed before anything depends on it: the first launch on a GPU runs a
kernel that adds one and checks its result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pallas_kernels import _device
from pallas_kernels._compile import CompiledKernel, CompileOptions, compile_kernel
from pallas_kernels._kernel import Constant, KernelModule, LaunchError, Operands, TritonKernel

kernels = KernelModule("pallas_kernels._self_test.triton")
PTX_CUSTOM_CALL = "__gpu$xla.gpu.ptx"
# The probe requests more than the 48 KB that need no opt-in, because attention depends on the opt-in.
_PROBE_SHARED_MEMORY, _PROBE_SIZE = 64 << 10, 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelLaunch:
    """A compiled kernel with everything that a launch needs besides its input arrays.

    Attributes:
        kernel: Function decorated with ``triton.jit``.
        compiled: The kernel compiled for the target.
        capability: Ten times the compute capability of the target.
        options: Warps and pipeline stages.
        operands: Names of the inputs, outputs, and aliases between them.
        grid: Number of programs along three axes.
        constants: Values of the ``tl.constexpr`` parameters.
    """

    kernel: TritonKernel
    compiled: CompiledKernel
    capability: int
    options: CompileOptions
    operands: Operands
    grid: tuple[int, ...]
    constants: Mapping[str, Constant]


def dispatch_launch(launch: KernelLaunch, *inputs: jax.Array) -> list[jax.Array]:
    """Returns the outputs of a kernel, launched by the backend that works on this device."""
    return _BACKENDS[select_backend()](launch, *inputs)


def select_backend() -> str:
    """Returns the name of the backend for the current target. Cross-compiling assumes XLA's custom call.

    Raises:
        LaunchError: If no backend works.
    """
    return "ptx" if _device.is_cross_compiling() else _find_backend()


def _launch_ptx(launch: KernelLaunch, *inputs: jax.Array) -> list[jax.Array]:
    compiled, outputs = launch.compiled, list(launch.operands.outputs.values())
    call = jax.ffi.ffi_call(PTX_CUSTOM_CALL, outputs, input_output_aliases=launch.operands.alias_indices)
    results = call(
        *inputs,
        # Triton appends two pointers to scratch memory, which no kernel here uses.
        inputs[0],
        inputs[0],
        name=compiled.name,
        kernel_type="ptx",
        kernel_data=compiled.ptx,
        grid_x=np.int32(launch.grid[0]),
        grid_y=np.int32(launch.grid[1]),
        grid_z=np.int32(launch.grid[2]),
        block_x=np.int32(32 * compiled.num_warps),
        block_y=np.int32(1),
        block_z=np.int32(1),
        shared_mem_bytes=np.int32(compiled.shared_memory),
        output_indices=tuple(np.int32(len(inputs) + i) for i in range(len(outputs))),
    )
    return list(results)


def _launch_jax_triton(launch: KernelLaunch, *inputs: jax.Array) -> list[jax.Array]:
    results = _import_jax_triton().triton_call(
        *inputs,
        kernel=launch.kernel,
        out_shape=list(launch.operands.outputs.values()),
        grid=launch.grid,
        num_warps=launch.options.num_warps,
        num_stages=launch.options.num_stages,
        compute_capability=launch.capability,
        input_output_aliases=launch.operands.alias_indices,
        **launch.constants,
    )
    return list(results)


_BACKENDS: dict[str, Callable[..., list[jax.Array]]] = {"ptx": _launch_ptx, "jax-triton": _launch_jax_triton}


def _import_jax_triton() -> Any:
    """Imports jax-triton without the empty TRITON_CACHE_DIR that it sets when it is imported."""
    with _preserve_env("TRITON_CACHE_DIR"):
        try:
            import jax_triton  # pyright: ignore[reportMissingImports]  # optional: the second choice
        except ImportError as error:
            raise LaunchError(f"the package jax-triton is not usable ({error})") from None
    return jax_triton


@contextlib.contextmanager
def _preserve_env(name: str) -> Iterator[None]:
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@functools.cache
def _find_backend() -> str:
    """Returns the first backend that works on the default device."""
    if os.environ.get("CUDA_CACHE_DISABLE") == "1":
        warnings.warn(
            "CUDA_CACHE_DISABLE=1: the driver will compile every launch of every kernel again at each start; unset it",
            RuntimeWarning,
            stacklevel=2,
        )
    problems: dict[str, str] = {}
    for name in _BACKENDS:
        problem = _probe_failure(name)
        if problem is None:
            if problems:
                warnings.warn(
                    "kernels are launched by jax-triton, outside of CUDA graphs and so more slowly: XLA's own call "
                    f"for PTX does not work here ({problems['ptx']})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return name
        problems[name] = problem
    reasons = "; ".join(f"by {name}: {problem}" for name, problem in problems.items())
    raise LaunchError(
        f"kernels cannot be launched on this GPU ({reasons}): check that the driver is one for CUDA 13 and triton is "
        "3.6.0 (pip install 'glm-jax[cuda]'), or load the model with kernels='reference'"
    )


def _probe_failure(name: str) -> str | None:
    """Returns why a backend does not work here, or ``None`` if it does."""
    try:
        result = _run_add_one(name)
    except Exception as error:  # XLA, the driver and the packages raise many kinds
        return str(error).strip().partition("\n")[0] or type(error).__name__
    is_wrong = not np.array_equal(result, np.arange(_PROBE_SIZE, dtype=np.float32) + 1)
    return "a kernel that adds one gave something else" if is_wrong else None


def _run_add_one(name: str) -> np.ndarray:
    """Runs the kernel that adds one on 0, 1, …; also while another program is being traced."""
    target = _device.current_target()
    if target is None:
        raise LaunchError("JAX's default device is no GPU")
    constants, options = {"N": _PROBE_SIZE}, CompileOptions(num_warps=1, num_stages=1)
    element_types = (("x", "fp32"), ("out", "fp32"))
    compiled = compile_kernel(
        kernels.add_one_kernel, element_types, tuple(constants.items()), target.capability, options
    )
    output = jax.ShapeDtypeStruct((_PROBE_SIZE,), np.float32)
    launch = KernelLaunch(
        kernel=kernels.add_one_kernel,
        compiled=dataclasses.replace(compiled, shared_memory=_PROBE_SHARED_MEMORY),
        capability=target.capability,
        options=options,
        operands=Operands(inputs=("x",), outputs={"out": output}),
        grid=(1, 1, 1),
        constants=constants,
    )
    with jax.ensure_compile_time_eval():
        (result,) = jax.jit(functools.partial(_BACKENDS[name], launch))(np.arange(_PROBE_SIZE, dtype=np.float32))
        return np.asarray(result)
