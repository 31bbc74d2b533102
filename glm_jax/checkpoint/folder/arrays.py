"""One part of a converted folder is one Orbax checkpoint: written whole and atomically, read in slices.

Plain Zarr 3 files (no OCDBT), uncompressed, so that any slice can be read alone and the arrays open in other programs.
An array of experts has a chunk per expert.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import ARRAY_DTYPES
from glm_jax.checkpoint.folder.layout import DiskArray
from glm_jax.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

ZARR_CHUNK_BYTES = 16 << 20
READ_BLOCK_BYTES = 32 << 20


def layer_checkpoint_folder(folder: Path, checkpoint_name: str) -> Path:
    """Where a part lies in a converted folder."""
    return folder / "parts" / checkpoint_name


def remove_layer_checkpoint(folder: Path, checkpoint_name: str) -> None:
    """Removes a part and whatever a killed run left of it."""
    path = layer_checkpoint_folder(folder, checkpoint_name)
    for leftover in path.parent.glob(f"{checkpoint_name}*"):
        if leftover.name == checkpoint_name or leftover.name.startswith(f"{checkpoint_name}.orbax-checkpoint-tmp"):
            shutil.rmtree(leftover)


def write_layer_checkpoint(
    folder: Path, checkpoint_name: str, disk_arrays: Sequence[DiskArray], arrays: Mapping[str, Array]
) -> None:
    """Writes the arrays of a part; the folder appears under its name when all of them are complete.

    Args:
        folder: the converted folder.
        checkpoint_name: name of the part.
        disk_arrays: its arrays.
        arrays: their values, contiguous, by name.
    """
    import orbax.checkpoint as ocp  # takes a second, and only writing needs it

    tree, save_args = {}, {}
    for place in disk_arrays:
        by_expert = (0,) if place.chunked_by_expert else ()
        _set_nested(tree, place.path, arrays[place.name])
        _set_nested(save_args, place.path, ocp.SaveArgs(chunk_byte_size=ZARR_CHUNK_BYTES, shard_axes=by_expert))
    remove_layer_checkpoint(folder, checkpoint_name)
    with _silence_absl_logging(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(
            layer_checkpoint_folder(folder, checkpoint_name).resolve(),
            args=ocp.args.PyTreeSave(tree, save_args=save_args),
        )


def is_array_complete(folder: Path, disk_array: DiskArray, dtype: str) -> bool:
    """Whether the files of an array are all there in their full size; reads its metadata alone."""
    path = layer_checkpoint_folder(folder, disk_array.checkpoint_name) / disk_array.name
    try:
        fields = json.loads((path / "zarr.json").read_bytes())
        if (tuple(fields["shape"]), fields["data_type"]) != (disk_array.shape, dtype):
            return False
        stored = fields["chunk_grid"]["configuration"]["chunk_shape"]
        inner = fields["codecs"][0]["configuration"]["chunk_shape"]
        grid = [size // step for size, step in zip(disk_array.shape, stored, strict=True)]
        index = 16 * (math.prod(stored) // math.prod(inner)) + 4  # a place per inner chunk, and a checksum
        size = math.prod(stored) * ARRAY_DTYPES[dtype].itemsize + index
        return all(path.joinpath("c", *map(str, at)).stat().st_size == size for at in np.ndindex(*grid))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return False


def _handler() -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    from glm_jax.checkpoint.folder.orbax_numpy import NoCopyNumpyHandler

    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, NoCopyNumpyHandler())),
    )


def iter_array_blocks(
    folder: Path, disk_array: DiskArray, dtype: str, start: int, stop: int
) -> Iterator[tuple[int, Array]]:
    """Rows ``start`` to ``stop`` of an array in pieces of about 32 MB, the next one read while one is used.

    Raises:
        CheckpointError: if the array is missing, damaged, or not of the shape and dtype expected.
    """
    with _wrap_tensorstore_errors(disk_array):
        store = _open_zarr(layer_checkpoint_folder(folder, disk_array.checkpoint_name) / disk_array.name)
        if store.shape != disk_array.shape or store.dtype.name != dtype:
            raise CheckpointError(
                f"{disk_array.checkpoint_name}/{disk_array.name} is {store.dtype.name} {list(store.shape)}, "
                f"the manifest says {dtype} {list(disk_array.shape)}: convert again"
            )
        bounds = list(_chunk_aligned_ranges(store, start, stop))
        futures = [store[first:last].read() for first, last in bounds[:1]]
    for i, (first, last) in enumerate(bounds):
        del last
        with _wrap_tensorstore_errors(disk_array):
            piece = futures.pop(0).result()
            futures += [store[a:b].read() for a, b in bounds[i + 1 : i + 2]]
        yield first, piece


def read_rows(folder: Path, disk_array: DiskArray, dtype: str, start: int, stop: int) -> Array:
    """Rows of an array in one piece.

    Raises:
        CheckpointError: as :func:`iter_array_blocks`.
    """
    pieces = [piece for _, piece in iter_array_blocks(folder, disk_array, dtype, start, stop)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def chunk_aligned_ranges(folder: Path, disk_array: DiskArray, start: int, stop: int) -> list[tuple[int, int]]:
    """Rows ``start`` to ``stop`` of an array as stretches of about 32 MB that end where chunks do.

    Raises:
        CheckpointError: if the array is missing or damaged.
    """
    with _wrap_tensorstore_errors(disk_array):
        return list(
            _chunk_aligned_ranges(
                _open_zarr(layer_checkpoint_folder(folder, disk_array.checkpoint_name) / disk_array.name), start, stop
            )
        )


def _open_zarr(path: Path) -> Any:
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
        # Zarr reads a missing chunk as zeros unless told that it is an error.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, read=True).result()


def _chunk_aligned_ranges(store: Any, start: int, stop: int) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, int(np.prod(store.shape[1:])) * store.dtype.numpy_dtype.itemsize)
    chunk_rows = store.chunk_layout.read_chunk.shape[0]
    rows = max(1, READ_BLOCK_BYTES // row_bytes // chunk_rows) * chunk_rows
    # Blocks end where chunks do, so that no chunk is read twice.
    edges = [start, *range((start // rows + 1) * rows, stop, rows), stop]
    return itertools.pairwise(edges)


def _set_nested(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


@contextlib.contextmanager
def _wrap_tensorstore_errors(place: DiskArray) -> Iterator[None]:
    """Turns TensorStore's errors into ours; it raises ValueError for everything."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(" [")[0]
        raise CheckpointError(
            f"{place.checkpoint_name}/{place.name} is missing or damaged ({reason}): convert again"
        ) from None


@contextlib.contextmanager
def _silence_absl_logging() -> Iterator[None]:
    """Orbax warns of the features that our options leave out, and logs tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
