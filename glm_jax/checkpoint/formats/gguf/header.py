"""Parses the header of a GGUF file and checks all of it before any tensor is read.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, the number of tensors and of
metadata fields; the fields, each with name, type and value; name, shape, type and offset of each tensor; and, aligned,
the tensors' bytes. Every number counts as hostile until it is checked: nothing is read or allocated beyond the file's
size, and a file that passes can be mapped and sliced without further tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np

from glm_jax.checkpoint.formats.gguf.ggml_types import GGML_TYPES, GgmlType
from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

MetadataValue: TypeAlias = int | float | bool | str | np.ndarray[Any, np.dtype[Any]] | list[bytes]
"""Value of a metadata field; a list of numbers is an array, a list of strings is a list of undecoded bytes."""

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_GGUF_HEADER_BYTES = 1 << 27  # ten times the header with the largest vocabulary
MAX_STRINGS = 1 << 22  # strings in one list
_MAX_ENTRIES = 1 << 17  # tensors, and metadata fields
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MIN_FIELD_BYTES, _MIN_TENSOR_BYTES = 13, 24  # size of an entry with an empty name

_NUMBER_DTYPES: dict[int, np.dtype[Any]] = {
    type_id: np.dtype(dtype)
    for type_id, dtype in {
        0: "<u1",
        1: "<i1",
        2: "<u2",
        3: "<i2",
        4: "<u4",
        5: "<i4",
        6: "<f4",
        7: "?",
        10: "<u8",
        11: "<i8",
        12: "<f8",
    }.items()
}
_STRING, _LIST = 8, 9  # type ids of the other fields
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """Type, shape and byte range of one tensor.

    Attributes:
        name: Name of the tensor in the file.
        type: Type of its blocks.
        shape: Row-major shape, the reverse of the order in the file.
        begin: Offset of the tensor's first byte in the file.
        end: Offset of the first byte after the tensor.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Number of bytes in one row of the tensor."""
        return self.shape[-1] // self.type.block_size * self.type.type_size


@dataclasses.dataclass(frozen=True, slots=True)
class GgufHeader:
    """Header of one GGUF file.

    Attributes:
        fields: Metadata fields by name.
        tensors: Tensors by name.
        digest: SHA-256 of the header's bytes, in hexadecimal digits.
    """

    fields: Mapping[str, MetadataValue]
    tensors: Mapping[str, GgufTensorInfo]
    digest: str


def read_uint(fields: Mapping[str, MetadataValue], key: str, file: str, default: int | None = None) -> int:
    """Reads a metadata field that holds a non-negative integer.

    Args:
        fields: Metadata fields of the file.
        key: Name of the field.
        file: File name for error messages.
        default: Value of an absent field.

    Raises:
        CheckpointError: If the field holds something else, or is absent and there is no default.
    """
    value = fields.get(key, default)
    if value is None:
        raise CheckpointError(f"{file} lacks the field {key}")
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file}: {key} must be a whole number, not {printable(repr(value))}")
    return value


def read_gguf_header(file: BinaryIO, size: int, name: str) -> GgufHeader:
    """Reads and checks the header of an open file.

    Args:
        file: The file, at its first byte.
        size: Size of the file in bytes.
        name: File name for error messages.

    Raises:
        CheckpointError: If the file is not a GGUF file of a supported version and byte order, if a count, length or
            offset exceeds the file, or if a name occurs twice.
    """
    cursor = _Cursor(file, size, name)
    num_tensors, num_fields = _read_counts(cursor)
    fields = _collect_unique(name, "field", (_read_field(cursor) for _ in range(num_fields)))
    alignment = read_uint(fields, "general.alignment", name, _DEFAULT_ALIGNMENT)
    if alignment < 8 or alignment & (alignment - 1):
        raise CheckpointError(f"{name}: general.alignment is {alignment}, not a power of two of at least 8")
    raw_infos = _collect_unique(name, "tensor", (_read_tensor_info(cursor) for _ in range(num_tensors)))
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {key: _check_tensor_info(key, info, data_start, alignment, cursor) for key, info in raw_infos.items()}
    _check_overlap(tensors, name)
    length, cursor.position = cursor.position, 0
    file.seek(0)
    return GgufHeader(fields, tensors, hashlib.sha256(cursor.take(length)).hexdigest())


class _Cursor:
    """Reads a file from its first byte on, never past its end."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name, self.position = file, size, name, 0

    def require(self, count: int, subject: str) -> None:
        """Rejects a read that exceeds the rest of the file, or the size of any header."""
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.name}: {subject} goes beyond the file, which has {self.size:,} bytes: it is truncated or "
                "damaged"
            )
        if self.position + count > MAX_GGUF_HEADER_BYTES:
            raise CheckpointError(f"{self.name}: the header has more than {MAX_GGUF_HEADER_BYTES:,} bytes")

    def take(self, count: int, subject: str = "the header") -> bytes:
        self.require(count, subject)
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.name} changed while it was being read")
        self.position += count
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> bytes:
        return self.take(self.u64(), "a string in the header")

    def text(self, subject: str) -> str:
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.name}: {subject} is not UTF-8 text: the file is damaged") from None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic and version, and reads the number of tensors and of metadata fields."""
    if cursor.size < 24:
        raise CheckpointError(f"{cursor.name} has {cursor.size} bytes, too few for a GGUF file: download it again")
    if (magic := cursor.take(4)) != MAGIC:
        hint = " (only a Git LFS pointer: fetch the file itself)" if magic == b"vers" else ""
        raise CheckpointError(f"{cursor.name} is not a GGUF file{hint}: it begins with {magic!r}")
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{cursor.name} is a big-endian GGUF file: get the little-endian one, or turn it round with "
            "`gguf-convert-endian` of the gguf package"
        )
    if version not in VERSIONS:
        raise CheckpointError(f"{cursor.name} is GGUF version {version}; versions 2 and 3 can be read")
    tensors, fields = cursor.u64(), cursor.u64()
    if tensors > _MAX_ENTRIES or fields > _MAX_ENTRIES:
        raise CheckpointError(f"{cursor.name}: a header of {tensors} tensors and {fields} fields is damaged")
    cursor.require(
        tensors * _MIN_TENSOR_BYTES + fields * _MIN_FIELD_BYTES, f"a header of {tensors} tensors and {fields} fields"
    )
    return tensors, fields


def _collect_unique(file: str, kind: str, pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    """Collects named values in a dictionary and rejects duplicate names."""
    values: dict[str, _Value] = {}
    for name, value in pairs:
        if name in values:
            raise CheckpointError(f"{file} has the {kind} {printable(name)} twice")
        values[name] = value
    return values


def _read_field(cursor: _Cursor) -> tuple[str, MetadataValue]:
    key = cursor.text("a field's name")
    type_id = cursor.u32()
    if type_id == _STRING:
        return key, cursor.text(f"field {printable(key)}")
    if type_id == _LIST:
        return key, _read_list(cursor, key)
    dtype = _number_dtype(cursor, key, type_id)
    return key, np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()


def _number_dtype(cursor: _Cursor, key: str, type_id: int) -> np.dtype[Any]:
    if type_id not in _NUMBER_DTYPES:
        raise CheckpointError(f"{cursor.name}: field {printable(key)} has the unknown type {type_id}")
    return _NUMBER_DTYPES[type_id]


def _read_list(cursor: _Cursor, key: str) -> MetadataValue:
    type_id, count = cursor.u32(), cursor.u64()
    subject = f"field {printable(key)}, a list of {count},"
    if type_id != _STRING:
        dtype = _number_dtype(cursor, key, type_id)
        return np.frombuffer(cursor.take(count * dtype.itemsize, subject), dtype)
    cursor.require(8 * count, subject)
    if count > MAX_STRINGS:
        raise CheckpointError(f"{cursor.name}: {subject} is longer than any vocabulary")
    return [cursor.string() for _ in range(count)]


@dataclasses.dataclass(frozen=True, slots=True)
class _RawTensorInfo:
    """A tensor's entry as the file has it: unchecked, with the offset counted from the first tensor byte."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


def _read_tensor_info(cursor: _Cursor) -> tuple[str, _RawTensorInfo]:
    name = cursor.text("a tensor's name")
    dimensions = cursor.u32()
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.name}: tensor {printable(name)} has {dimensions} dimensions")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    return name, _RawTensorInfo(sizes[::-1], cursor.u32(), cursor.u64())


def _check_tensor_info(
    name: str, info: _RawTensorInfo, data_start: int, alignment: int, cursor: _Cursor
) -> GgufTensorInfo:
    where = f"{cursor.name}: tensor {printable(name)}"
    ggml_type = GGML_TYPES.get(info.type_id)
    if ggml_type is None:
        raise CheckpointError(
            f"{where} has the unknown GGUF type {info.type_id}: get a file quantized with a current llama.cpp"
        )
    if 0 in info.shape or info.shape[-1] % ggml_type.block_size:
        raise CheckpointError(
            f"{where} is {list(info.shape)}, which {ggml_type.name}, with its blocks of {ggml_type.block_size}, "
            "cannot be"
        )
    if info.offset % alignment:
        raise CheckpointError(f"{where} is at offset {info.offset}, which is not a multiple of {alignment}")
    begin = data_start + info.offset
    end = begin + math.prod(info.shape) // ggml_type.block_size * ggml_type.type_size
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.name} is truncated: tensor {printable(name)} ends at byte {end:,}, the file at {cursor.size:,}"
        )
    return GgufTensorInfo(name, ggml_type, info.shape, begin, end)


def _check_overlap(tensors: Mapping[str, GgufTensorInfo], name: str) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: info.begin):
        if info.begin < end:
            raise CheckpointError(f"{name}: tensor {printable(info.name)} overlaps the one before it")
        end = info.end
