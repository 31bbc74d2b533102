"""The weight and module types that the readers of all quantization formats share, with their common checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from glm_jax.checkpoint.messages import printable
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES, SAFETENSORS_DTYPES, TensorInfo
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.quant_spec import ScaleDtype

Array = np.ndarray[Any, np.dtype[Any]]

# Safetensors dtypes that scales may have -> the QuantSpec's name. Plain bytes hold exponents (e8m0).
SCALE_DTYPES: dict[str, ScaleDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BYTE_SCALE_DTYPES: dict[str, ScaleDtype] = {"U8": "e8m0", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3"}
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


@dataclasses.dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of a checkpoint under its logical name, stored in one tensor or several.

    Attributes:
        name: Logical name, such as ``model.layers.1.self_attn.q_a_proj.weight``.
        shape: Shape of the weight: ``[*stack, O, I]`` if it is quantized, any shape if it is plain.
        dtype: Dtype of a plain tensor. For a quantized weight, the dtype of the values that the format's own library
            computes (float32 if the scales have 8 bits).
        spec: Quantization that holds the weight without loss; None for a plain array.
        tensor_names: Names of the tensors in the file, for error messages.
        load: Reads the weight, or only one entry of its leading axis if an index is passed. Values are checked when
            they are loaded.
        is_dequantized: Whether the file quantizes the weight in a way that no QuantSpec describes, so that ``load``
            dequantizes it into a plain array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    spec: QuantSpec | None
    tensor_names: tuple[str, ...]
    load: Callable[[int | None], Array | QuantizedTensor]
    is_dequantized: bool = False


class TensorReader(Protocol):
    """Interface that the formats need of :class:`~glm_jax.checkpoint.safetensors.reader.SafetensorsReader`."""

    def __iter__(self) -> Iterator[str]: ...
    def tensor_info(self, name: str) -> TensorInfo: ...  # noqa: D102
    def get_tensor(self, name: str) -> Array: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedModule:
    """The tensors of one quantized module.

    Attributes:
        name: Name of the module, such as ``model.layers.1.self_attn.o_proj``.
        reader: Reader of the checkpoint's tensors.
        names_by_suffix: Full name of each tensor, by the last component of the name (``qweight``, ``scales``, …).
    """

    name: str
    reader: TensorReader
    names_by_suffix: Mapping[str, str]

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.names_by_suffix

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Full names of the module's tensors, sorted."""
        return tuple(sorted(self.names_by_suffix.values()))

    def error(self, problem: str) -> CheckpointError:
        """Builds an error that names this module; the caller raises it."""
        return CheckpointError(f"{printable(self.name)}: {problem}")

    def require(self, suffix: str, dtypes: tuple[str, ...], ndim: int | None = None) -> TensorInfo:
        """Dtype and shape of a tensor that the module must have.

        Raises:
            CheckpointError: If it is missing, or has another dtype or number of dimensions.
        """
        if suffix not in self.names_by_suffix:
            present = ", ".join(sorted(self.names_by_suffix))
            raise self.error(f"{suffix} is missing beside {printable(present)}: the checkpoint is incomplete")
        info = self.reader.tensor_info(self.names_by_suffix[suffix])
        if SAFETENSORS_DTYPE_NAMES[info.dtype] not in dtypes:
            raise self.error(
                f"{suffix} has dtype {SAFETENSORS_DTYPE_NAMES[info.dtype]}, expected {' or '.join(dtypes)}"
            )
        if ndim is not None and len(info.shape) != ndim:
            raise self.error(f"{suffix} has shape {list(info.shape)}, expected {ndim} dimensions")
        return info

    def require_shape(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorInfo:
        """Dtype and shape of a tensor that the module must have in one of the given shapes.

        Raises:
            CheckpointError: If it is missing, or has another dtype or shape.
        """
        info = self.require(suffix, dtypes)
        if info.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(f"{suffix} has shape {list(info.shape)}, expected {expected}")
        return info

    def read(self, suffix: str, index: int | None = None) -> Array:
        """Reads a tensor, or one entry of its leading axis."""
        array = self.reader.get_tensor(self.names_by_suffix[suffix])
        return array if index is None else array[index]

    def stored_weight(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        spec: QuantSpec | None,
        build: Callable[[int | None], Array | QuantizedTensor],
    ) -> StoredWeight:
        """Wraps the module as one weight; ``build`` reads all of it, or one entry of its leading axis."""

        def load(index: int | None = None) -> Array | QuantizedTensor:
            if index is not None and len(shape) < 3:
                raise IndexError(f"{self.name} is a single matrix and has no stack axis to index")
            return build(index)

        return StoredWeight(
            f"{self.name}.weight", shape, np.dtype(dtype), spec, self.tensor_names, load, is_dequantized=spec is None
        )


def read_plain(name: str, reader: TensorReader) -> StoredWeight:
    """Wraps an unquantized tensor as a weight of the same name."""
    info = reader.tensor_info(name)

    def load(index: int | None = None) -> Array:
        array = reader.get_tensor(name)
        return array if index is None else array[index]

    return StoredWeight(name, info.shape, info.dtype, None, (name,), load)


def check_scales(module: QuantizedModule, suffix: str, scales: Array) -> Array:
    """Checks scales of 16 or 32 bits and returns them unchanged.

    Raises:
        CheckpointError: If one of them is zero or not finite.
    """
    wide = scales.astype(np.float32)
    if not np.isfinite(wide).all():
        raise module.error(f"{suffix} holds values that are not finite: the file is damaged")
    if not wide.all():
        raise module.error(f"{suffix} holds zeros, which no quantizer writes: the file is damaged")
    return scales


def check_byte_scales(module: QuantizedModule, suffix: str, scales: Array, scale_dtype: ScaleDtype) -> Array:
    """Checks scales of 8 bits and returns their bit patterns as uint8.

    Scales in e4m3 may be zero, since quantizers let small blocks underflow.

    Raises:
        CheckpointError: If one of them is NaN.
    """
    bits = scales.view(np.uint8)
    is_nan = (bits & 0x7F) == E4M3_NAN if scale_dtype == "e4m3" else bits == E8M0_NAN
    if is_nan.any():
        raise module.error(f"{suffix} holds values that are not numbers: the file is damaged")
    return bits


def scale_dtype_of(info: TensorInfo) -> ScaleDtype:
    """A QuantSpec's name for the dtype of scales in :data:`SCALE_DTYPES` or :data:`BYTE_SCALE_DTYPES`."""
    return (SCALE_DTYPES | BYTE_SCALE_DTYPES)[SAFETENSORS_DTYPE_NAMES[info.dtype]]


def dequantized_dtype(scale_dtype: ScaleDtype) -> np.dtype[Any]:
    """Dtype of the values that a format's own library computes: that of 16-bit scales, otherwise float32."""
    return {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": SAFETENSORS_DTYPES["F16"]}.get(
        scale_dtype, SAFETENSORS_DTYPES["F32"]
    )


def infer_block_size(
    module: QuantizedModule, size: int, count: int, declared_size: int | None, axis: str, *, allow_partial: bool = False
) -> int:
    """Computes how many inputs or outputs share a scale.

    Args:
        module: Module that error messages name.
        size: Number of inputs or outputs of the matrix.
        count: Number of scales along this axis.
        declared_size: Block size according to the configuration; 0 for the whole axis, None if it says nothing.
        axis: "inputs" or "outputs", for error messages.
        allow_partial: Whether the last block may be smaller than the others.

    Returns:
        Block size along the axis; 0 if one scale serves the whole axis.

    Raises:
        CheckpointError: If no block size fits, or the declared one does not.
    """
    if declared_size is not None:
        if -(-size // (declared_size or size)) != count or (not allow_partial and size % (declared_size or size)):
            declared = f"blocks of {declared_size} {axis}" if declared_size else f"one scale for all {axis}"
            raise module.error(f"the configuration says {declared}, but {size} {axis} have {count} scales")
        return declared_size
    if count == 1:
        return 0
    if count and size % count == 0:
        return size // count
    raise module.error(f"{count} scales do not divide {size} {axis}")
