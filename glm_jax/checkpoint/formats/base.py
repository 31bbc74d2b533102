"""A weight as a checkpoint stores it, whatever the format, and what the readers of all formats share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.safetensors.header import DTYPES, NAMES, TensorEntry, printable
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.quant_spec import ScaleKind

Array = np.ndarray[Any, np.dtype[Any]]

# How scales may be stored, and what a QuantSpec calls it. Bytes are exponents; "e4m3" keeps its bit patterns.
SCALES: dict[str, ScaleKind] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BYTE_SCALES: dict[str, ScaleKind] = {"U8": "e8m0", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3"}
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A weight in one tensor or several, under its logical name.

    Attributes:
        name: such as ``model.layers.1.self_attn.q_a_proj.weight``.
        shape: of the weight, ``[*stack, O, I]`` (any shape for a plain tensor).
        dtype: of a plain tensor; of a quantised one that in which its own library gives values (float32 where the
            scales have 8 bits).
        spec: how it is stored here, without loss; None for a plain array.
        tensors: names in the file, for messages.
        load: gives the weight, or with a number one row of its leading axis, reading no more than that. Values are
            checked here and not before.
        unpacked: whether the file has it quantised in a way that no storage here holds, so that it is a plain array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    spec: QuantSpec | None
    tensors: tuple[str, ...]
    load: Callable[[int | None], Array | QuantizedTensor]
    unpacked: bool = False


class Tensors(Protocol):
    """What is asked of a :class:`~glm_jax.checkpoint.safetensors.reader.Reader`."""

    def __iter__(self) -> Iterator[str]: ...
    def entry(self, name: str) -> TensorEntry: ...  # noqa: D102
    def get(self, name: str) -> Array: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module by the last part of their names (``qweight``, ``scales``, …)."""

    name: str
    reader: Tensors
    parts: Mapping[str, str]

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    @property
    def tensors(self) -> tuple[str, ...]:
        """Their full names."""
        return tuple(sorted(self.parts.values()))

    def error(self, problem: str) -> CheckpointError:
        """An error about this module, to be raised."""
        return CheckpointError(f"{printable(self.name)}: {problem}")

    def need(self, part: str, kinds: tuple[str, ...], ndim: int | None = None) -> TensorEntry:
        """Dtype and shape of a tensor that must be there.

        Raises:
            CheckpointError: if it is missing, or of another dtype or number of dimensions.
        """
        if part not in self.parts:
            beside = ", ".join(sorted(self.parts))
            raise self.error(f"{part} is missing beside {printable(beside)}: the checkpoint is incomplete")
        entry = self.reader.entry(self.parts[part])
        if NAMES[entry.dtype] not in kinds:
            raise self.error(f"{part} has dtype {NAMES[entry.dtype]}, expected {' or '.join(kinds)}")
        if ndim is not None and len(entry.shape) != ndim:
            raise self.error(f"{part} has shape {list(entry.shape)}, expected {ndim} dimensions")
        return entry

    def need_shape(self, part: str, kinds: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorEntry:
        """The same for a tensor whose shape is known (or is one of several).

        Raises:
            CheckpointError: if it is missing, or of another dtype or shape.
        """
        entry = self.need(part, kinds)
        if entry.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(f"{part} has shape {list(entry.shape)}, expected {expected}")
        return entry

    def read(self, part: str, row: int | None = None) -> Array:
        """A tensor, or one row of its leading axis."""
        array = self.reader.get(self.parts[part])
        return array if row is None else array[row]

    def stored(
        self, shape: tuple[int, ...], dtype: Any, spec: QuantSpec | None, build: Callable[[int | None], Any]
    ) -> Stored:
        """A quantised weight; ``build`` reads it, or one row of its stack."""

        def load(row: int | None = None) -> Array | QuantizedTensor:
            if row is not None and len(shape) < 3:
                raise IndexError(f"{self.name} is a single matrix and has no stack axis to index")
            return build(row)

        return Stored(f"{self.name}.weight", shape, np.dtype(dtype), spec, self.tensors, load, unpacked=spec is None)


def plain(name: str, reader: Tensors) -> Stored:
    """A tensor that is stored as it is."""
    entry = reader.entry(name)

    def load(row: int | None = None) -> Array:
        array = reader.get(name)
        return array if row is None else array[row]

    return Stored(name, entry.shape, entry.dtype, None, (name,), load)


def check_scales(module: Module, part: str, scales: Array) -> Array:
    """Scales of 16 or 32 bits, unchanged.

    Raises:
        CheckpointError: if one is not a finite number, or is zero.
    """
    wide = scales.astype(np.float32)
    if not np.isfinite(wide).all():
        raise module.error(f"{part} holds values that are not finite: the file is damaged")
    if not wide.all():
        raise module.error(f"{part} holds zeros, which no quantiser writes: the file is damaged")
    return scales


def check_byte_scales(module: Module, part: str, scales: Array, kind: str) -> Array:
    """Bit patterns of scales with 8 bits, as uint8; e4m3 may be zero, since writers let small blocks underflow.

    Raises:
        CheckpointError: if one is not a number.
    """
    bits = scales.view(np.uint8)
    bad = (bits & 0x7F) == E4M3_NAN if kind == "e4m3" else bits == E8M0_NAN
    if bad.any():
        raise module.error(f"{part} holds values that are not numbers: the file is damaged")
    return bits


def scale_kind(entry: TensorEntry) -> ScaleKind:
    """What a QuantSpec calls the dtype of scales that are in :data:`SCALES` or :data:`BYTE_SCALES`."""
    return (SCALES | BYTE_SCALES)[NAMES[entry.dtype]]


def values_dtype(kind: str) -> np.dtype[Any]:
    """The dtype that a library gives values in: that of the scales, or float32 where they have 8 bits."""
    return {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": DTYPES["F16"]}.get(kind, DTYPES["F32"])


def block_size(module: Module, size: int, count: int, declared: int | None, axis: str, *, cut: bool = False) -> int:
    """How many of ``size`` rows or columns share a scale when there are ``count`` scales; 0 for all.

    Args:
        module: for messages.
        size: rows or columns.
        count: scales along them.
        declared: what the configuration says.
        axis: "inputs" or "outputs".
        cut: whether the last block may be smaller.

    Raises:
        CheckpointError: if no size fits, or the one that the configuration gives does not.
    """
    if declared is not None:
        if -(-size // (declared or size)) != count or (not cut and size % (declared or size)):
            said = f"blocks of {declared} {axis}" if declared else f"one scale for all {axis}"
            raise module.error(f"the configuration says {said}, but {size} {axis} have {count} scales")
        return declared
    if count == 1:
        return 0
    if count and size % count == 0:
        return size // count
    raise module.error(f"{count} scales do not divide {size} {axis}")
