"""Runs kernels in Triton's interpreter on NumPy arrays, in place of the torch tensors that it expects.

The interpreter stores bfloat16 as raw 16-bit integers and cannot compute in it, so kernels take the dtype of their
products as a constant, which is float32 here. ``TRITON_INTERPRET=1`` must be in the environment before triton is
imported.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from pallas_kernels._kernel import Constant, Operands, TritonKernel

TRITON_DTYPES = {  # Triton's names of NumPy's dtypes
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "uint32": "u32",
    "int8": "i8",
    "uint8": "u8",
}

ProgramIds: TypeAlias = Sequence[tuple[int, ...]]
_INTERPRETER_LOCK = threading.Lock()
_SELECTED_PROGRAMS: contextvars.ContextVar[ProgramIds | None] = contextvars.ContextVar("glm_jax_programs", default=None)


class _Storage:
    """The part of a torch storage that the interpreter uses."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> _Storage:
        return self

    def copy_(self, other: Any) -> None:
        """Does nothing: the interpreter works in the array itself."""


class NumpyTensor:
    """A contiguous NumPy array with the methods of a torch tensor that the interpreter uses."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, TRITON_DTYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Storage:
        return _Storage(self.array)

    def new_empty(self, *_: Any, **__: Any) -> NumpyTensor:
        return NumpyTensor.__new__(NumpyTensor)

    def set_(self, storage: _Storage, *_: Any) -> None:
        self.array, self.dtype = storage.array, TRITON_DTYPES[storage.array.dtype.name]

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def interpret(
    kernel: TritonKernel,
    operands: Operands,
    grid: tuple[int, ...],
    constants: Mapping[str, Constant],
    *inputs: jax.Array,
) -> list[jax.Array]:
    """Runs a kernel program by program, also inside a compiled function.

    Args:
        kernel: Function decorated with ``triton.jit``.
        operands: Names of its inputs, outputs and aliases.
        grid: Number of programs along each axis.
        constants: Values of its ``tl.constexpr`` parameters.
        *inputs: Arrays, in the order of ``operands.inputs``.
    """
    run = functools.partial(_run_interpreter, kernel, operands, grid, dict(constants), _SELECTED_PROGRAMS.get())
    return list(jax.pure_callback(run, list(operands.outputs.values()), *inputs, vmap_method="sequential"))


def _run_interpreter(
    kernel: TritonKernel,
    operands: Operands,
    grid: tuple[int, ...],
    constants: dict[str, Constant],
    program_ids: ProgramIds | None,
    *inputs: Any,
) -> list[np.ndarray]:
    arrays = {name: np.array(x, order="C") for name, x in zip(operands.inputs, inputs, strict=True)}
    results = {name: _poisoned_output(output) for name, output in operands.outputs.items()}
    for source, target in operands.aliases.items():
        results[target] = arrays[source]
    tensors = {name: NumpyTensor(array) for name, array in (arrays | results).items()}
    # The interpreter's state is global to the process, and the devices of a CPU are threads of one process.
    with _INTERPRETER_LOCK, warnings.catch_warnings():
        # Triton extracts the number from an array of one element in a deprecated way, and computes values that a mask
        # then drops.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        grids = contextlib.nullcontext(grid) if program_ids is None else _restricted_grid(grid, program_ids)
        with _language_patched_once(), grids as launched:
            kernel[launched](**tensors, **constants)
    return list(results.values())


def _triton_interpreter() -> Any:
    from triton.runtime import interpreter  # optional: the extra "cuda"

    return interpreter


@contextlib.contextmanager
def _language_patched_once() -> Iterator[None]:
    """Patches Triton's language once per module and launch.

    Triton does so at every call of a device function, and then searches all its modules for what is patched already.
    """
    interpreter, patched = _triton_interpreter(), set()
    patch_language = interpreter._patch_lang

    def patch_new_module(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch_language(function)

    interpreter._patch_lang = patch_new_module
    try:
        yield
    finally:
        interpreter._patch_lang = patch_language


@contextlib.contextmanager
def restrict_programs(programs: ProgramIds) -> Iterator[None]:
    """Makes kernels traced within the context run these programs alone; the outputs of the others stay undefined.

    A kernel at its real size takes minutes otherwise.
    """
    token = _SELECTED_PROGRAMS.set(tuple(programs))
    try:
        yield
    finally:
        _SELECTED_PROGRAMS.reset(token)


@contextlib.contextmanager
def _restricted_grid(grid: tuple[int, ...], programs: ProgramIds) -> Iterator[tuple[int, ...]]:
    """Yields a grid with one program for each listed id; each sees its id and the size of the whole grid."""
    builder = _triton_interpreter().interpreter_builder
    set_idx, set_dim = builder.set_grid_idx, builder.set_grid_dim
    whole = (*grid, 1, 1)[:3]
    builder.set_grid_idx = lambda x, *_: set_idx(*(*programs[x], 0, 0)[:3])
    builder.set_grid_dim = lambda *_: set_dim(*whole)
    try:
        yield (len(programs),)
    finally:
        builder.set_grid_idx, builder.set_grid_dim = set_idx, set_dim


def _poisoned_output(output: jax.ShapeDtypeStruct) -> np.ndarray:
    """Fills an output with NaN or the largest integer, which no kernel may rely on."""
    dtype = np.dtype(output.dtype)
    poison = np.iinfo(dtype).max if dtype.kind in "iu" else np.nan
    return np.full(output.shape, poison, dtype)
