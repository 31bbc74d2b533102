"""How a kernel gets into a program: by XLA's own custom call for PTX, or by jax-triton where that does not work.

The custom call is internal to XLA, so it is tried once before anything depends on it: on the first launch on a GPU a
kernel that adds one is run and its result looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import _device
from pallas_kernels._compile import CompiledKernel, CompileOptions, LaunchError, compile_kernel

PTX_CUSTOM_CALL = "__gpu$xla.gpu.ptx"
# More than the 48 KB that a program has without asking: attention needs it, so it must be granted.
_PROBE_SHARED_MEMORY, _PROBE_SIZE = 64 << 10, 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelLaunch:
    """A kernel and how it is started.

    Attributes:
        kernel: decorated with ``triton.jit``.
        compiled: for the target.
        capability: of the target.
        options: warps and stages.
        outputs: shapes and dtypes.
        grid: programs along three axes.
        aliases: index of an input to that of the output that takes its place.
        constants: the ``tl.constexpr`` parameters.
    """

    kernel: Any
    compiled: CompiledKernel
    capability: int
    options: CompileOptions
    outputs: Sequence[jax.ShapeDtypeStruct]
    grid: tuple[int, ...]
    aliases: Mapping[int, int]
    constants: Mapping[str, Any]


def dispatch_launch(launch: KernelLaunch, *inputs: jax.Array) -> list[jax.Array]:
    """The outputs of a kernel, by the route that works here."""
    return _BACKENDS[select_backend()](launch, *inputs)


def select_backend() -> str:
    """Name of the route for the target at hand: nothing is tried for a card that is not here.

    Raises:
        LaunchError: if none works.
    """
    return "ptx" if _device.is_cross_compiling() else _find_backend()


def _launch_ptx(what: KernelLaunch, *inputs: jax.Array) -> list[jax.Array]:
    compiled, number = what.compiled, np.int32
    call = jax.ffi.ffi_call(PTX_CUSTOM_CALL, list(what.outputs), input_output_aliases=dict(what.aliases))
    made = call(
        *inputs,
        # Triton adds two pointers to scratch memory, which no kernel here uses.
        inputs[0],
        inputs[0],
        name=compiled.name,
        kernel_type="ptx",
        kernel_data=compiled.ptx,
        grid_x=number(what.grid[0]),
        grid_y=number(what.grid[1]),
        grid_z=number(what.grid[2]),
        block_x=number(32 * compiled.num_warps),
        block_y=number(1),
        block_z=number(1),
        shared_mem_bytes=number(compiled.shared_memory),
        output_indices=tuple(number(len(inputs) + i) for i in range(len(what.outputs))),
    )
    return list(made)


def _launch_jax_triton(what: KernelLaunch, *inputs: jax.Array) -> list[jax.Array]:
    made = _import_jax_triton().triton_call(
        *inputs,
        kernel=what.kernel,
        out_shape=list(what.outputs),
        grid=what.grid,
        num_warps=what.options.num_warps,
        num_stages=what.options.num_stages,
        compute_capability=what.capability,
        input_output_aliases=dict(what.aliases),
        **what.constants,
    )
    return list(made)


_BACKENDS: dict[str, Callable[..., list[jax.Array]]] = {"ptx": _launch_ptx, "jax-triton": _launch_jax_triton}


def _import_jax_triton() -> Any:
    """The package, which sets an empty TRITON_CACHE_DIR when it is imported."""
    with _preserve_env("TRITON_CACHE_DIR"):
        try:
            import jax_triton  # pyright: ignore[reportMissingImports]
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
    """The first route that works on the device at hand."""
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
    """Why a route does not work here; None if it does."""
    try:
        found = _run_add_one(name)
    except Exception as error:  # whatever XLA, the driver or a package raise
        return str(error).strip().partition("\n")[0] or type(error).__name__
    wrong = not np.array_equal(found, np.arange(_PROBE_SIZE, dtype=np.float32) + 1)
    return "a kernel that adds one gave something else" if wrong else None


def _run_add_one(name: str) -> np.ndarray:
    """What a kernel that adds one makes of 0, 1, …; also while another program is being traced."""
    from pallas_kernels._self_test.triton import add_one_kernel

    target = _device.current_target()
    if target is None:
        raise LaunchError("JAX's default device is no GPU")
    constants, shape = {"N": _PROBE_SIZE}, CompileOptions(num_warps=1, num_stages=1)
    compiled = compile_kernel(add_one_kernel, ("fp32", "fp32"), tuple(constants.items()), target.capability, shape)
    what = KernelLaunch(
        kernel=add_one_kernel,
        compiled=dataclasses.replace(compiled, shared_memory=_PROBE_SHARED_MEMORY),
        capability=target.capability,
        options=shape,
        outputs=[jax.ShapeDtypeStruct((_PROBE_SIZE,), np.float32)],
        grid=(1, 1, 1),
        aliases={},
        constants=constants,
    )
    with jax.ensure_compile_time_eval():
        (made,) = jax.jit(functools.partial(_BACKENDS[name], what))(np.arange(_PROBE_SIZE, dtype=np.float32))
        return np.asarray(made)
