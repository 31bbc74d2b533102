"""Triton's interpreter on NumPy arrays, in place of the torch tensors that it expects.

It computes bfloat16 as raw 16-bit integers, so kernels take the dtype they compute in as a constant, and are given
float32 here. ``TRITON_INTERPRET=1`` must be in the environment before triton is imported.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

TRITON_DTYPES = {  # as Triton names them
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "uint32": "u32",
    "int8": "i8",
    "uint8": "u8",
}


_INTERPRETER_LOCK = threading.Lock()
ProgramIds = Sequence[tuple[int, ...]]
_SELECTED_PROGRAMS: contextvars.ContextVar[ProgramIds | None] = contextvars.ContextVar("glm_jax_programs", default=None)


class _Storage:
    """What the interpreter asks of a tensor's storage."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> _Storage:
        return self

    def copy_(self, other: Any) -> None:
        """The interpreter works in the array itself, so there is nothing to bring back."""


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
    kernel: Any,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    aliases: Mapping[int, int],
    *inputs: jax.Array,
) -> list[jax.Array]:
    """Runs a kernel program by program, also where it is part of a compiled function."""
    run = functools.partial(
        _run_interpreter, kernel, tuple(outputs), grid, dict(constants), dict(aliases), _SELECTED_PROGRAMS.get()
    )
    return list(jax.pure_callback(run, list(outputs), *inputs, vmap_method="sequential"))


def _run_interpreter(
    kernel: Any,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    constants: dict[str, Any],
    aliases: dict[int, int],
    program_ids: ProgramIds | None,
    *inputs: Any,
) -> list[np.ndarray]:
    arrays = [np.array(x, order="C") for x in inputs]
    made = [_poisoned_output(output) for output in outputs]
    for source, destination in aliases.items():
        made[destination] = arrays[source]
    # The interpreter's state is the process's own, and devices of a CPU are threads of it.
    with _INTERPRETER_LOCK, warnings.catch_warnings():
        # Triton's own: it takes the number out of an array of one element in a way that NumPy will not always allow,
        # and computes what a mask then drops.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        grids = contextlib.nullcontext(grid) if program_ids is None else _restricted_grid(grid, program_ids)
        with _language_patched_once(), grids as launched:
            kernel[launched](*map(NumpyTensor, arrays), *map(NumpyTensor, made), **constants)
    return made


def _triton_interpreter() -> Any:
    from triton.runtime import interpreter  # optional, and needed by the interpreter alone

    return interpreter


@contextlib.contextmanager
def _language_patched_once() -> Iterator[None]:
    """Replaces Triton's language once per module and launch.

    Triton does so at every call of a device function, and searches all of its modules for what it has replaced already.
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
    """Kernels that are traced meanwhile run these programs alone; what others would have written stays undefined.

    A kernel at its real size takes minutes otherwise.
    """
    token = _SELECTED_PROGRAMS.set(tuple(programs))
    try:
        yield
    finally:
        _SELECTED_PROGRAMS.reset(token)


@contextlib.contextmanager
def _restricted_grid(grid: tuple[int, ...], programs: ProgramIds) -> Iterator[tuple[int, ...]]:
    """A grid of so many programs, each of which takes itself for one of the whole grid."""
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
    """Contents that no kernel may count on: NaN, or a large number."""
    dtype = np.dtype(output.dtype)
    worst = np.iinfo(dtype).max if dtype.kind in "iu" else np.nan
    return np.full(output.shape, worst, dtype)
