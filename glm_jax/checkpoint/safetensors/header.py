"""Parses the header of a safetensors file and checks all of it before any tensor is read.

Format (https://github.com/huggingface/safetensors): eight bytes with the little-endian length of a JSON object, the
object, then the tensors' bytes without gaps. Every field counts as hostile until it is checked, so a file that passes
can be mapped and sliced without further tests.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
HEADER_LENGTH_BYTES = 8

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
SAFETENSORS_DTYPE_NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and byte range (from ``begin`` up to, not including, ``end``) of one tensor in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Header of one safetensors file: its tensors by name, and its free-form metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def parse_header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Reads the length of the JSON header from the first eight bytes of a file.

    Args:
        prefix: The first eight bytes of the file, or all of a shorter file.
        file_size: Size of the whole file in bytes.
        file: File name for error messages.

    Returns:
        Length of the JSON header in bytes.

    Raises:
        CheckpointError: If the file is too short to hold a header of that length.
    """
    if len(prefix) < HEADER_LENGTH_BYTES:
        raise CheckpointError(f"{file} has {file_size} bytes, too few for a safetensors file: download it again")
    length = int.from_bytes(prefix[:HEADER_LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, file_size - HEADER_LENGTH_BYTES):
        raise CheckpointError(
            f"{file} announces a header of {length} bytes but has {file_size} bytes in all: "
            "it is truncated or not a safetensors file"
        )
    return length


def parse_header(raw: bytes, file_size: int, file: str) -> SafetensorsHeader:
    """Parses and checks a header.

    Args:
        raw: The JSON object, without the eight bytes before it.
        file_size: Size of the whole file in bytes.
        file: File name for error messages.

    Raises:
        CheckpointError: For broken JSON, unknown dtypes, and byte ranges that exceed the file, do not fit the dtype
            and shape, overlap, or leave gaps.
    """
    fields = _load_object(raw, file)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map names to strings")
    base = HEADER_LENGTH_BYTES + len(raw)
    tensors = {name: _parse_tensor_info(name, value, base, file) for name, value in fields.items()}
    _check_ranges(tensors, base, file_size, file)
    return SafetensorsHeader(tensors, metadata)


def _load_object(raw: bytes, file: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_reject_duplicate_keys(file))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{file}: the header is not valid JSON ({printable(str(error))})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: the header must be a JSON object")
    return fields


def _reject_duplicate_keys(file: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise CheckpointError(f"{file}: the header names {printable(duplicate)} twice")
        return fields

    return build_object


def _parse_tensor_info(name: str, value: Any, base: int, file: str) -> TensorInfo:
    where = f"{file}: tensor {printable(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    if not isinstance(value["dtype"], str) or value["dtype"] not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{where} has dtype {printable(str(value['dtype']))}; known are {', '.join(SAFETENSORS_DTYPES)}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_natural_list(shape) or len(shape) > 32 or not _is_natural_list(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has a shape or data_offsets that are not non-negative integers")
    dtype, (begin, end) = SAFETENSORS_DTYPES[value["dtype"]], offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where} has {end - begin} bytes where {value['dtype']} {shape} needs {expected}: the file is damaged"
        )
    return TensorInfo(dtype, tuple(shape), base + begin, base + end)


def _is_natural_list(value: Any) -> bool:
    # Sizes past 2**62 cannot be mapped and would overflow in C code later.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _check_ranges(tensors: Mapping[str, TensorInfo], base: int, file_size: int, file: str) -> None:
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.end > file_size:
            raise CheckpointError(
                f"{file} is truncated: tensor {printable(name)} ends at byte {info.end}, the file at {file_size}"
            )
        if info.begin != end:
            problem = (
                "overlaps the tensor before it" if info.begin < end else f"leaves a gap of {info.begin - end} bytes"
            )
            raise CheckpointError(f"{file}: tensor {printable(name)} {problem}")
        end = info.end
    if end != file_size:
        raise CheckpointError(f"{file} has {file_size - end} bytes after the last tensor: it is damaged")
