"""Records of written arrays: shape, dtype and hash of each, as the manifest and the conversion state keep them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# The integers hold the packed values, zero points and permutations of quantized weights.
ARRAY_DTYPES = FLOAT_DTYPES | {name: np.dtype(name) for name in ("uint8", "int8", "int16", "int32")}


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayRecord:
    """Shape and dtype of one array, and the SHA-256 of its bytes in C order, little-endian."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def from_array(cls, array: Array) -> ArrayRecord:
        """Record of an array in memory."""
        return cls.from_blocks(array.shape, array.dtype.name, [array])

    @classmethod
    def from_blocks(cls, shape: tuple[int, ...], dtype: str, blocks: Iterable[Array]) -> ArrayRecord:
        """Record of an array that arrives in consecutive blocks of rows."""
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        return cls(shape, dtype, digest.hexdigest())

    @classmethod
    def from_json(cls, value: Any) -> ArrayRecord:
        """Parses one record.

        Raises:
            ValueError: If the value is not exactly the JSON form of a record.
        """
        if not isinstance(value, dict) or set(value) != {"shape", "dtype", "sha256"}:
            raise ValueError(f"an array must have shape, dtype and sha256, not {value!r}")
        shape = value["shape"]
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"impossible shape {shape!r}")
        if value["dtype"] not in ARRAY_DTYPES or not re.fullmatch(r"[0-9a-f]{64}", str(value["sha256"])):
            raise ValueError(f"impossible dtype or sha256 in {value!r}")
        return cls(tuple(shape), value["dtype"], value["sha256"])


ArrayRecords = Mapping[str, ArrayRecord]  # array name -> record, for one layer checkpoint or safetensors file


def records_to_json(records: ArrayRecords) -> dict[str, Any]:
    """JSON form of the records of one layer checkpoint or safetensors file."""
    return {name: dataclasses.asdict(record) for name, record in records.items()}


def records_from_json(value: Any) -> dict[str, ArrayRecord]:
    """Inverse of :func:`records_to_json`.

    Raises:
        ValueError: If the value is not a JSON form of records.
    """
    if not isinstance(value, dict):
        raise ValueError("a layer checkpoint must map array names to arrays")
    return {name: ArrayRecord.from_json(record) for name, record in value.items()}


def hash_records(records_by_checkpoint: Mapping[str, ArrayRecords]) -> str:
    """SHA-256 of the records of all layer checkpoints, in hexadecimal digits."""
    fields = {name: records_to_json(records) for name, records in records_by_checkpoint.items()}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
