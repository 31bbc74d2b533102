"""Writes safetensors files block by block, so that a file of any size needs the memory of one block of a tensor."""

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
        name: Name of the tensor in the file.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        iter_blocks: Function that yields the tensor's consecutive blocks; called when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    iter_blocks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def split_into_shards(
    outputs: Sequence[TensorOutput], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[TensorOutput]]:
    """Distributes tensors, in order, over numbered files.

    Args:
        outputs: Tensors in the order in which they are written.
        max_bytes: Largest size of a file's tensors in bytes; a single larger tensor gets a file of its own.

    Returns:
        Tensors of each file, by file name.
    """
    shards: list[list[TensorOutput]] = [[]]
    shard_bytes = 0
    for output in outputs:
        if shards[-1] and shard_bytes + output.nbytes > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(output)
        shard_bytes += output.nbytes
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def write_shard(path: Path, outputs: Sequence[TensorOutput], advance: Callable[[int], None]) -> dict[str, ArrayRecord]:
    """Writes one safetensors file atomically.

    Args:
        path: Path of the file.
        outputs: Tensors of the file.
        advance: Called after each block with the number of bytes written.

    Returns:
        Shape, dtype and hash of each tensor, by name.
    """
    with open_atomic(path, path.with_name(f"{path.name}.tmp")) as file:
        header = _build_header(outputs)
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


def _build_header(outputs: Sequence[TensorOutput]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers rejects files without it
    begin = 0
    for output in outputs:
        end = begin + output.nbytes
        fields[output.name] = {
            "dtype": SAFETENSORS_DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes


def build_index_json(shards: Mapping[str, Sequence[TensorOutput]], source: str) -> str:
    """JSON text of ``model.safetensors.index.json``.

    Args:
        shards: Tensors of each file, by file name.
        source: Key of the source and options that the checkpoint was written from, kept in the metadata.
    """
    total = sum(output.nbytes for outputs in shards.values() for output in outputs)
    weight_map = {output.name: file for file, outputs in shards.items() for output in outputs}
    fields = {"metadata": {"source": source, "total_size": total}, "weight_map": weight_map}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
