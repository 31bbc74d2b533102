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

from glm_jax.checkpoint.folder.layout import DiskArray
from glm_jax.checkpoint.folder.manifest import ARRAY_DTYPES
from glm_jax.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK_BYTES = 16 << 20
READ_BYTES = 32 << 20


def part_folder(folder: Path, part: str) -> Path:
    """Where a part lies in a converted folder."""
    return folder / "parts" / part


def remove_part(folder: Path, part: str) -> None:
    """Removes a part and whatever a killed run left of it."""
    path = part_folder(folder, part)
    for leftover in path.parent.glob(f"{part}*"):
        if leftover.name == part or leftover.name.startswith(f"{part}.orbax-checkpoint-tmp"):
            shutil.rmtree(leftover)


def write_part(folder: Path, part: str, places: Sequence[DiskArray], arrays: Mapping[str, Array]) -> None:
    """Writes the arrays of a part; the folder appears under its name when all of them are complete.

    Args:
        folder: the converted folder.
        part: name of the part.
        places: its arrays.
        arrays: their values, contiguous, by name.
    """
    import orbax.checkpoint as ocp  # takes a second, and only writing needs it

    tree, save_args = {}, {}
    for place in places:
        by_expert = (0,) if place.by_expert else ()
        _insert(tree, place.path, arrays[place.name])
        _insert(save_args, place.path, ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=by_expert))
    remove_part(folder, part)
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(part_folder(folder, part).resolve(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


def is_whole(folder: Path, place: DiskArray, dtype: str) -> bool:
    """Whether the files of an array are all there in their full size; reads its metadata alone."""
    path = part_folder(folder, place.part) / place.name
    try:
        fields = json.loads((path / "zarr.json").read_bytes())
        if (tuple(fields["shape"]), fields["data_type"]) != (place.shape, dtype):
            return False
        stored = fields["chunk_grid"]["configuration"]["chunk_shape"]
        inner = fields["codecs"][0]["configuration"]["chunk_shape"]
        grid = [size // step for size, step in zip(place.shape, stored, strict=True)]
        index = 16 * (math.prod(stored) // math.prod(inner)) + 4  # a place per inner chunk, and a checksum
        size = math.prod(stored) * ARRAY_DTYPES[dtype].itemsize + index
        return all(path.joinpath("c", *map(str, at)).stat().st_size == size for at in np.ndindex(*grid))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return False


def _handler() -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    from glm_jax.checkpoint.folder.orbax_numpy import PatientNumpyHandler

    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, PatientNumpyHandler())),
    )


def read_array(folder: Path, place: DiskArray, dtype: str, start: int, stop: int) -> Iterator[tuple[int, Array]]:
    """Rows ``start`` to ``stop`` of an array in pieces of about 32 MB, the next one read while one is used.

    Raises:
        CheckpointError: if the array is missing, damaged, or not of the shape and dtype expected.
    """
    with _explained(place):
        store = _open(part_folder(folder, place.part) / place.name)
        if store.shape != place.shape or store.dtype.name != dtype:
            raise CheckpointError(
                f"{place.part}/{place.name} is {store.dtype.name} {list(store.shape)}, "
                f"the manifest says {dtype} {list(place.shape)}: convert again"
            )
        bounds = list(_row_blocks(store, start, stop))
        futures = [store[first:last].read() for first, last in bounds[:1]]
    for i, (first, last) in enumerate(bounds):
        del last
        with _explained(place):
            piece = futures.pop(0).result()
            futures += [store[a:b].read() for a, b in bounds[i + 1 : i + 2]]
        yield first, piece


def read_rows(folder: Path, place: DiskArray, dtype: str, start: int, stop: int) -> Array:
    """Rows of an array in one piece.

    Raises:
        CheckpointError: as :func:`read_array`.
    """
    pieces = [piece for _, piece in read_array(folder, place, dtype, start, stop)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def row_blocks(folder: Path, place: DiskArray, start: int, stop: int) -> list[tuple[int, int]]:
    """Rows ``start`` to ``stop`` of an array as stretches of about 32 MB that end where chunks do.

    Raises:
        CheckpointError: if the array is missing or damaged.
    """
    with _explained(place):
        return list(_row_blocks(_open(part_folder(folder, place.part) / place.name), start, stop))


def _open(path: Path) -> Any:
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
        # Zarr reads a missing chunk as zeros unless told that it is an error.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, read=True).result()


def _row_blocks(store: Any, start: int, stop: int) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, int(np.prod(store.shape[1:])) * store.dtype.numpy_dtype.itemsize)
    chunk_rows = store.chunk_layout.read_chunk.shape[0]
    rows = max(1, READ_BYTES // row_bytes // chunk_rows) * chunk_rows
    # Blocks end where chunks do, so that no chunk is read twice.
    edges = [start, *range((start // rows + 1) * rows, stop, rows), stop]
    return itertools.pairwise(edges)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


@contextlib.contextmanager
def _explained(place: DiskArray) -> Iterator[None]:
    """Turns TensorStore's errors into ours; it raises ValueError for everything."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(" [")[0]
        raise CheckpointError(f"{place.part}/{place.name} is missing or damaged ({reason}): convert again") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of the features that our options leave out, and logs tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
