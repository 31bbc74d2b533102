"""Writes and reads the layer checkpoints of a converted folder: each is one Orbax checkpoint of Zarr 3 arrays.

A layer checkpoint is written as a whole and atomically. Its arrays are uncompressed Zarr files (no OCDBT), so that any
slice can be read alone and other programs can open them. In an array of experts no chunk holds more than one expert.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorstore as ts

from glm_jax.checkpoint.array_record import ARRAY_DTYPES
from glm_jax.checkpoint.folder.layout import DiskArray
from glm_jax.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

ZARR_CHUNK_BYTES = 16 << 20
READ_BLOCK_BYTES = 32 << 20


def layer_checkpoint_folder(folder: Path, checkpoint_name: str) -> Path:
    """Path of a layer checkpoint in a converted folder."""
    return folder / "parts" / checkpoint_name


def remove_layer_checkpoint(folder: Path, checkpoint_name: str) -> None:
    """Removes a layer checkpoint, and temporary folders of it that a killed process left behind."""
    path = layer_checkpoint_folder(folder, checkpoint_name)
    for leftover in path.parent.glob(f"{checkpoint_name}*"):
        if leftover.name == checkpoint_name or leftover.name.startswith(f"{checkpoint_name}.orbax-checkpoint-tmp"):
            shutil.rmtree(leftover)


def write_layer_checkpoint(
    folder: Path, checkpoint_name: str, disk_arrays: Sequence[DiskArray], arrays: Mapping[str, Array]
) -> None:
    """Writes a layer checkpoint; its folder appears under its name once all arrays are complete.

    Args:
        folder: The converted folder.
        checkpoint_name: Name of the layer checkpoint.
        disk_arrays: Layout of its arrays.
        arrays: Values of the arrays by name, each C-contiguous.
    """
    from glm_jax.checkpoint.folder.orbax_numpy import save_arrays  # importing Orbax takes a second

    remove_layer_checkpoint(folder, checkpoint_name)
    path = layer_checkpoint_folder(folder, checkpoint_name).resolve()
    save_arrays(path, disk_arrays, arrays, chunk_bytes=ZARR_CHUNK_BYTES)


def is_array_complete(folder: Path, disk_array: DiskArray, dtype: str) -> bool:
    """Whether all files of an array exist in full size; reads the array's metadata and no values."""
    path = layer_checkpoint_folder(folder, disk_array.checkpoint_name) / disk_array.name
    try:
        fields = json.loads((path / "zarr.json").read_bytes())
        if (tuple(fields["shape"]), fields["data_type"]) != (disk_array.shape, dtype):
            return False
        shard_shape = fields["chunk_grid"]["configuration"]["chunk_shape"]
        chunk_shape = fields["codecs"][0]["configuration"]["chunk_shape"]
        grid = [size // shard_size for size, shard_size in zip(disk_array.shape, shard_shape, strict=True)]
        # A shard's index has offset and length of each of its chunks, and a checksum.
        index_bytes = 16 * (math.prod(shard_shape) // math.prod(chunk_shape)) + 4
        file_bytes = math.prod(shard_shape) * ARRAY_DTYPES[dtype].itemsize + index_bytes
        return all(path.joinpath("c", *map(str, at)).stat().st_size == file_bytes for at in np.ndindex(*grid))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return False


def iter_array_blocks(
    folder: Path, disk_array: DiskArray, dtype: str, start: int, stop: int
) -> Iterator[tuple[int, Array]]:
    """Yields rows ``start`` to ``stop`` of an array in blocks of about 32 MB, and reads one block ahead.

    Args:
        folder: The converted folder.
        disk_array: Layout of the array.
        dtype: Dtype of the array according to the manifest.
        start: First row.
        stop: End of the rows.

    Yields:
        The first row of a block, and the block.

    Raises:
        CheckpointError: If the array is missing, damaged, or of another shape or dtype.
    """
    with _wrap_tensorstore_errors(disk_array):
        store = _open_zarr(folder, disk_array)
        if store.shape != disk_array.shape or store.dtype.name != dtype:
            raise CheckpointError(
                f"{disk_array.checkpoint_name}/{disk_array.name} is {store.dtype.name} {list(store.shape)}, "
                f"the manifest says {dtype} {list(disk_array.shape)}: convert again"
            )
        ranges = list(_chunk_aligned_ranges(store, start, stop))
        futures = [store[first:last].read() for first, last in ranges[:1]]
    for i, (first, _) in enumerate(ranges):
        with _wrap_tensorstore_errors(disk_array):
            block = futures.pop(0).result()
            futures += [store[next_first:next_last].read() for next_first, next_last in ranges[i + 1 : i + 2]]
        yield first, block


def read_rows(folder: Path, disk_array: DiskArray, dtype: str, start: int, stop: int) -> Array:
    """Reads rows ``start`` to ``stop`` of an array as one array; arguments as for :func:`iter_array_blocks`.

    Raises:
        CheckpointError: If the array is missing, damaged, or of another shape or dtype.
    """
    blocks = [block for _, block in iter_array_blocks(folder, disk_array, dtype, start, stop)]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def chunk_aligned_ranges(folder: Path, disk_array: DiskArray, start: int, stop: int) -> list[tuple[int, int]]:
    """Splits rows ``start`` to ``stop`` of an array into ranges of about 32 MB that end at chunk boundaries.

    Raises:
        CheckpointError: If the array is missing or damaged.
    """
    with _wrap_tensorstore_errors(disk_array):
        return list(_chunk_aligned_ranges(_open_zarr(folder, disk_array), start, stop))


def _open_zarr(folder: Path, disk_array: DiskArray) -> ts.TensorStore:
    path = layer_checkpoint_folder(folder, disk_array.checkpoint_name) / disk_array.name
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
        # By default Zarr reads a missing chunk as zeros instead of reporting an error.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, read=True).result()


def _chunk_aligned_ranges(store: ts.TensorStore, start: int, stop: int) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, int(np.prod(store.shape[1:])) * store.dtype.numpy_dtype.itemsize)
    chunk_rows = cast("tuple[int, ...]", store.chunk_layout.read_chunk.shape)[0]
    rows = max(1, READ_BLOCK_BYTES // row_bytes // chunk_rows) * chunk_rows
    # Ranges end at chunk boundaries, so that no chunk is read twice.
    edges = [start, *range((start // rows + 1) * rows, stop, rows), stop]
    return itertools.pairwise(edges)


@contextlib.contextmanager
def _wrap_tensorstore_errors(disk_array: DiskArray) -> Iterator[None]:
    """Turns TensorStore's errors inside the block into :class:`CheckpointError`; TensorStore only raises ValueError."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(" [")[0]
        raise CheckpointError(
            f"{disk_array.checkpoint_name}/{disk_array.name} is missing or damaged ({reason}): convert again"
        ) from None
