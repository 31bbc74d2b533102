"""A weight as a checkpoint stores it, whatever the format, and what the readers of all formats share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.messages import printable
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES, SAFETENSORS_DTYPES, TensorInfo
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.quant_spec import ScaleDtype

Array = np.ndarray[Any, np.dtype[Any]]

# How scales may be stored, and what a QuantSpec calls it. Bytes are exponents; "e4m3" keeps its bit patterns.
SCALE_DTYPES: dict[str, ScaleDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BYTE_SCALE_DTYPES: dict[str, ScaleDtype] = {"U8": "e8m0", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3"}
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


@dataclasses.dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in one tensor or several, under its logical name.

    Attributes:
        name: such as ``model.layers.1.self_attn.q_a_proj.weight``.
        shape: of the weight, ``[*stack, O, I]`` (any shape for a plain tensor).
        dtype: of a plain tensor; of a quantized one that in which its own library gives values (float32 where the
            scales have 8 bits).
        spec: how it is stored here, without loss; None for a plain array.
        tensor_names: names in the file, for messages.
        load: gives the weight, or with a number one row of its leading axis, reading no more than that. Values are
            checked here and not before.
        is_dequantized: whether the file has it quantized in a way that no storage here holds, so that it is a plain array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    spec: QuantSpec | None
    tensor_names: tuple[str, ...]
    load: Callable[[int | None], Array | QuantizedTensor]
    is_dequantized: bool = False


class TensorReader(Protocol):
    """What is asked of a :class:`~glm_jax.checkpoint.safetensors.reader.SafetensorsReader`."""

    def __iter__(self) -> Iterator[str]: ...
    def tensor_info(self, name: str) -> TensorInfo: ...  # noqa: D102
    def get_tensor(self, name: str) -> Array: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedModule:
    """The tensors of one module by the last part of their names (``qweight``, ``scales``, …)."""

    name: str
    reader: TensorReader
    names_by_suffix: Mapping[str, str]

    def __contains__(self, part: str) -> bool:
        return part in self.names_by_suffix

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Their full names."""
        return tuple(sorted(self.names_by_suffix.values()))

    def error(self, problem: str) -> CheckpointError:
        """An error about this module, to be raised."""
        return CheckpointError(f"{printable(self.name)}: {problem}")

    def require(self, suffix: str, dtypes: tuple[str, ...], ndim: int | None = None) -> TensorInfo:
        """Dtype and shape of a tensor that must be there.

        Raises:
            CheckpointError: if it is missing, or of another dtype or number of dimensions.
        """
        if suffix not in self.names_by_suffix:
            beside = ", ".join(sorted(self.names_by_suffix))
            raise self.error(f"{suffix} is missing beside {printable(beside)}: the checkpoint is incomplete")
        entry = self.reader.tensor_info(self.names_by_suffix[suffix])
        if SAFETENSORS_DTYPE_NAMES[entry.dtype] not in dtypes:
            raise self.error(
                f"{suffix} has dtype {SAFETENSORS_DTYPE_NAMES[entry.dtype]}, expected {' or '.join(dtypes)}"
            )
        if ndim is not None and len(entry.shape) != ndim:
            raise self.error(f"{suffix} has shape {list(entry.shape)}, expected {ndim} dimensions")
        return entry

    def require_shape(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorInfo:
        """The same for a tensor whose shape is known (or is one of several).

        Raises:
            CheckpointError: if it is missing, or of another dtype or shape.
        """
        entry = self.require(suffix, dtypes)
        if entry.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(f"{suffix} has shape {list(entry.shape)}, expected {expected}")
        return entry

    def read(self, suffix: str, row: int | None = None) -> Array:
        """A tensor, or one row of its leading axis."""
        array = self.reader.get_tensor(self.names_by_suffix[suffix])
        return array if row is None else array[row]

    def stored_weight(
        self, shape: tuple[int, ...], dtype: Any, spec: QuantSpec | None, build: Callable[[int | None], Any]
    ) -> StoredWeight:
        """A quantized weight; ``build`` reads it, or one row of its stack."""

        def load(row: int | None = None) -> Array | QuantizedTensor:
            if row is not None and len(shape) < 3:
                raise IndexError(f"{self.name} is a single matrix and has no stack axis to index")
            return build(row)

        return StoredWeight(
            f"{self.name}.weight", shape, np.dtype(dtype), spec, self.tensor_names, load, is_dequantized=spec is None
        )


def read_plain(name: str, reader: TensorReader) -> StoredWeight:
    """A tensor that is stored as it is."""
    entry = reader.tensor_info(name)

    def load(row: int | None = None) -> Array:
        array = reader.get_tensor(name)
        return array if row is None else array[row]

    return StoredWeight(name, entry.shape, entry.dtype, None, (name,), load)


def check_scales(module: QuantizedModule, suffix: str, scales: Array) -> Array:
    """Scales of 16 or 32 bits, unchanged.

    Raises:
        CheckpointError: if one is not a finite number, or is zero.
    """
    wide = scales.astype(np.float32)
    if not np.isfinite(wide).all():
        raise module.error(f"{suffix} holds values that are not finite: the file is damaged")
    if not wide.all():
        raise module.error(f"{suffix} holds zeros, which no quantizer writes: the file is damaged")
    return scales


def check_byte_scales(module: QuantizedModule, suffix: str, scales: Array, kind: str) -> Array:
    """Bit patterns of scales with 8 bits, as uint8; e4m3 may be zero, since writers let small blocks underflow.

    Raises:
        CheckpointError: if one is not a number.
    """
    bits = scales.view(np.uint8)
    bad = (bits & 0x7F) == E4M3_NAN if kind == "e4m3" else bits == E8M0_NAN
    if bad.any():
        raise module.error(f"{suffix} holds values that are not numbers: the file is damaged")
    return bits


def scale_kind(entry: TensorInfo) -> ScaleDtype:
    """What a QuantSpec calls the dtype of scales that are in :data:`SCALE_DTYPES` or :data:`BYTE_SCALE_DTYPES`."""
    return (SCALE_DTYPES | BYTE_SCALE_DTYPES)[SAFETENSORS_DTYPE_NAMES[entry.dtype]]


def dequantized_dtype(kind: str) -> np.dtype[Any]:
    """The dtype that a library gives values in: that of the scales, or float32 where they have 8 bits."""
    return {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": SAFETENSORS_DTYPES["F16"]}.get(
        kind, SAFETENSORS_DTYPES["F32"]
    )


def infer_block_size(
    module: QuantizedModule, size: int, count: int, declared_size: int | None, axis: str, *, allow_partial: bool = False
) -> int:
    """How many of ``size`` rows or columns share a scale when there are ``count`` scales; 0 for all.

    Args:
        module: for messages.
        size: rows or columns.
        count: scales along them.
        declared_size: what the configuration says.
        axis: "inputs" or "outputs".
        allow_partial: whether the last block may be smaller.

    Raises:
        CheckpointError: if no size fits, or the one that the configuration gives does not.
    """
    if declared_size is not None:
        if -(-size // (declared_size or size)) != count or (not allow_partial and size % (declared_size or size)):
            said = f"blocks of {declared_size} {axis}" if declared_size else f"one scale for all {axis}"
            raise module.error(f"the configuration says {said}, but {size} {axis} have {count} scales")
        return declared_size
    if count == 1:
        return 0
    if count and size % count == 0:
        return size // count
    raise module.error(f"{count} scales do not divide {size} {axis}")
