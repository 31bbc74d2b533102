"""Saves NumPy arrays with Orbax; a module of its own, because importing Orbax takes a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future, type_handlers

from glm_jax.checkpoint.folder.layout import DiskArray

Array = np.ndarray[Any, np.dtype[Any]]


def save_arrays(path: Path, disk_arrays: Sequence[DiskArray], arrays: Mapping[str, Array], *, chunk_bytes: int) -> None:
    """Saves arrays as one Orbax checkpoint of uncompressed Zarr 3 files.

    Args:
        path: Absolute path of the checkpoint.
        disk_arrays: Layout of the arrays.
        arrays: Values of the arrays by name, each C-contiguous.
        chunk_bytes: Largest size of a chunk in bytes.
    """
    tree: dict[str, Any] = {}
    save_args: dict[str, Any] = {}
    for disk_array in disk_arrays:
        shard_axes = (0,) if disk_array.chunked_by_expert else ()
        _set_nested(tree, disk_array.path, arrays[disk_array.name])
        _set_nested(save_args, disk_array.path, ocp.SaveArgs(chunk_byte_size=chunk_bytes, shard_axes=shard_axes))
    with _silence_absl_logging(), ocp.Checkpointer(_checkpoint_handler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def _checkpoint_handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, NoCopyNumpyHandler())),
    )


class NoCopyNumpyHandler(type_handlers.NumpyHandler):
    """Writes NumPy arrays without copying them first, and raises an error only after all writes have ended.

    Orbax copies arrays in case they change during the write; the arrays saved here never do. Orbax also closes its
    event loop at the first error, such as a full disk, and every write that is still pending then prints a traceback.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._pending_writes = 0

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[future.Future]:
        """Serializes the values as the base class does, and counts the pending writes."""
        self._pending_writes = len(values)
        return await super().serialize(values, infos, args)

    async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super()._open_and_write(*args, **kwargs)
        except Exception:
            self._pending_writes -= 1
            while self._pending_writes:
                await asyncio.sleep(0.01)
            raise
        self._pending_writes -= 1


def _set_nested(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


@contextlib.contextmanager
def _silence_absl_logging() -> Iterator[None]:
    """Silences Orbax, which warns of features that are off here and logs tracebacks of errors that it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
