"""Writes safetensors files tensor by tensor, so that a file of any size needs the memory of one tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import ArrayRecord
from glm_jax.checkpoint.atomic_write import open_atomic
from glm_jax.checkpoint.safetensors.header import HEADER_LENGTH_BYTES, SAFETENSORS_DTYPE_NAMES

Array = np.ndarray[Any, np.dtype[Any]]
MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class TensorOutput:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: of the tensor.
        dtype: of the tensor.
        iter_blocks: gives its contiguous blocks in order, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    iter_blocks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def split_into_shards(
    outputs: Sequence[TensorOutput], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[TensorOutput]]:
    """Tensors, in order, in numbered files of at most ``max_bytes`` bytes (or one tensor)."""
    groups: list[list[TensorOutput]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_shard(path: Path, outputs: Sequence[TensorOutput], advance: Callable[[int], None]) -> dict[str, ArrayRecord]:
    """Writes one file, which appears under its name when it is complete.

    Returns:
        The record of each tensor.
    """
    with open_atomic(path, path.with_name(f"{path.name}.tmp")) as file:
        header = _header(outputs)
        file.write(len(header).to_bytes(HEADER_LENGTH_BYTES, "little") + header)
        records = {}
        for output in outputs:
            digest = hashlib.sha256()
            for block in output.iter_blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                digest.update(data)
                file.write(data)
                advance(len(data))
            records[output.name] = ArrayRecord(output.shape, output.dtype.name, digest.hexdigest())
    return records


def _header(outputs: Sequence[TensorOutput]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say it
    at = 0
    for output in outputs:
        end = at + output.nbytes
        fields[output.name] = {
            "dtype": SAFETENSORS_DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the tensors start at a multiple of eight


def build_index_json(shards: Mapping[str, Sequence[TensorOutput]], source: str) -> str:
    """The index of a sharded checkpoint, with the key of what it was made from."""
    total = sum(output.nbytes for group in shards.values() for output in group)
    weight_map = {output.name: file for file, group in shards.items() for output in group}
    fields = {"metadata": {"source": source, "total_size": total}, "weight_map": weight_map}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
