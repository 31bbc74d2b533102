"""The header of a GGUF file, checked in full before anything trusts it.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, the number of tensors and of
fields; the fields, each a name, a type and a value; for each tensor its name, shape, type and place; and, aligned, the
tensors' bytes. Every number is hostile until checked: nothing is read or allocated beyond what the file has, and what
passes can be mapped and sliced without further tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from glm_jax.checkpoint.formats.gguf.ggml_types import GGML_TYPES, GgmlType
from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

MetadataValue = (
    Any  # int, float, bool, str, an array of numbers, or a list of bytes where the file has a list of strings
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_GGUF_HEADER_BYTES = 1 << 27  # ten times that of the largest vocabularies
MAX_STRINGS = 1 << 22  # in one list
_MAX_ENTRIES = 1 << 17  # tensors or fields
_ALIGNMENT = 32  # unless general.alignment says otherwise
_MAX_DIMENSIONS = 4
_SMALLEST_FIELD, _SMALLEST_TENSOR = 13, 24  # bytes, with an empty name

_NUMBER_DTYPES: dict[int, np.dtype[Any]] = {
    number: np.dtype(dtype)
    for number, dtype in {
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
_STRING, _LIST = 8, 9


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """Where one tensor lies.

    Attributes:
        name: in the file.
        type: of its values.
        shape: row-major, the reverse of how the file lists it.
        begin: first byte within the file.
        end: first byte after it.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of values."""
        return self.shape[-1] // self.type.block_size * self.type.type_size


@dataclasses.dataclass(frozen=True, slots=True)
class GgufHeader:
    """Fields and tensors of one file by name, and a hash of the header's bytes."""

    fields: Mapping[str, MetadataValue]
    tensors: Mapping[str, GgufTensorInfo]
    digest: str


def read_uint(fields: Mapping[str, MetadataValue], key: str, file: str, default: int | None = None) -> int:
    """A field that holds a number 0, 1, 2, …; the default where it is absent.

    Raises:
        CheckpointError: if it holds something else, or is absent without a default.
    """
    value = fields.get(key, default)
    if value is None:
        raise CheckpointError(f"{file} lacks the field {key}")
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file}: {key} must be a whole number, not {printable(repr(value))}")
    return value


def read_gguf_header(file: BinaryIO, size: int, name: str) -> GgufHeader:
    """Reads and checks the header of an open file of ``size`` bytes.

    Args:
        file: at its beginning.
        size: of the file.
        name: of the file, for messages.

    Raises:
        CheckpointError: if it is not a GGUF file of a version and byte order that can be read, if a count, length or
            offset goes beyond the file, or a name is there twice.
    """
    cursor = _Cursor(file, size, name)
    tensors, fields = _read_counts(cursor)
    values = _unique(name, "field", (_read_field(cursor) for _ in range(fields)))
    alignment = read_uint(values, "general.alignment", name, _ALIGNMENT)
    if alignment < 8 or alignment & (alignment - 1):
        raise CheckpointError(f"{name}: general.alignment is {alignment}, not a power of two of at least 8")
    infos = _unique(name, "tensor", (_read_tensor_info(cursor) for _ in range(tensors)))
    start = -(-cursor.position // alignment) * alignment
    entries = {key: _check_tensor_info(key, info, start, alignment, cursor) for key, info in infos.items()}
    _check_overlap(entries, name)
    length, cursor.position = cursor.position, 0
    file.seek(0)
    return GgufHeader(values, entries, hashlib.sha256(cursor.take(length)).hexdigest())


class _Cursor:
    """Reads from the front of a file, never past its end."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name, self.position = file, size, name, 0

    def require(self, count: int, what: str) -> None:
        """Refuses more bytes than the file has left, or than any header has."""
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.name}: {what} goes beyond the file, which has {self.size:,} bytes: it is truncated or damaged"
            )
        if self.position + count > MAX_GGUF_HEADER_BYTES:
            raise CheckpointError(f"{self.name}: the header has more than {MAX_GGUF_HEADER_BYTES:,} bytes")

    def take(self, count: int, what: str = "the header") -> bytes:
        self.require(count, what)
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

    def text(self, what: str) -> str:
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.name}: {what} is not UTF-8 text: the file is damaged") from None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
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
        tensors * _SMALLEST_TENSOR + fields * _SMALLEST_FIELD, f"a header of {tensors} tensors and {fields} fields"
    )
    return tensors, fields


def _unique(file: str, kind: str, pairs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"{file} has the {kind} {printable(name)} twice")
        found[name] = value
    return found


def _read_field(cursor: _Cursor) -> tuple[str, MetadataValue]:
    key = cursor.text("a field's name")
    kind = cursor.u32()
    if kind == _STRING:
        return key, cursor.text(f"field {printable(key)}")
    if kind == _LIST:
        return key, _read_list(cursor, key)
    dtype = _number_type(cursor, key, kind)
    return key, np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()


def _number_type(cursor: _Cursor, key: str, kind: int) -> np.dtype[Any]:
    if kind not in _NUMBER_DTYPES:
        raise CheckpointError(f"{cursor.name}: field {printable(key)} has the unknown type {kind}")
    return _NUMBER_DTYPES[kind]


def _read_list(cursor: _Cursor, key: str) -> MetadataValue:
    kind, count = cursor.u32(), cursor.u64()
    what = f"field {printable(key)}, a list of {count},"
    if kind != _STRING:
        dtype = _number_type(cursor, key, kind)
        return np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)
    cursor.require(8 * count, what)
    if count > MAX_STRINGS:
        raise CheckpointError(f"{cursor.name}: {what} is longer than any vocabulary")
    return [cursor.string() for _ in range(count)]


@dataclasses.dataclass(frozen=True, slots=True)
class _RawTensorInfo:
    shape: tuple[int, ...]
    kind: int
    offset: int


def _read_tensor_info(cursor: _Cursor) -> tuple[str, _RawTensorInfo]:
    name = cursor.text("a tensor's name")
    dimensions = cursor.u32()
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.name}: tensor {printable(name)} has {dimensions} dimensions")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    return name, _RawTensorInfo(sizes[::-1], cursor.u32(), cursor.u64())


def _check_tensor_info(name: str, info: _RawTensorInfo, start: int, alignment: int, cursor: _Cursor) -> GgufTensorInfo:
    where = f"{cursor.name}: tensor {printable(name)}"
    kind = GGML_TYPES.get(info.kind)
    if kind is None:
        raise CheckpointError(
            f"{where} has the unknown GGUF type {info.kind}: get a file quantized with a current llama.cpp"
        )
    if 0 in info.shape or info.shape[-1] % kind.block_size:
        raise CheckpointError(
            f"{where} is {list(info.shape)}, which {kind.name}, with its blocks of {kind.block_size}, cannot be"
        )
    if info.offset % alignment:
        raise CheckpointError(f"{where} is at offset {info.offset}, which is not a multiple of {alignment}")
    begin = start + info.offset
    end = begin + math.prod(info.shape) // kind.block_size * kind.type_size
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.name} is truncated: tensor {printable(name)} ends at byte {end:,}, the file at {cursor.size:,}"
        )
    return GgufTensorInfo(name, kind, info.shape, begin, end)


def _check_overlap(entries: Mapping[str, GgufTensorInfo], name: str) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.begin):
        if entry.begin < end:
            raise CheckpointError(f"{name}: tensor {printable(entry.name)} overlaps the one before it")
        end = entry.end
