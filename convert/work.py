"""The state of a conversion: a hidden folder inside the destination that makes it safe to kill and run again.

``.convert/run.json`` says what is being converted and how; ``.convert/<unit>.json`` is written when a unit (a part, a
shard) is complete and holds the hashes of its arrays. A unit without its record does not count and is written again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.manifest import MANIFEST, ArrayRecord, Records, records_from_json, records_to_json, write_atomic
from convert.reader import INDEX_NAME
from convert.source import COMPANIONS
from glm_jax.errors import CheckpointError, GlmError

WORK_FOLDER = ".convert"
_RUN = "run.json"
_SLACK_BYTES = 32 << 20  # metadata, and blocks that files do not fill


class Work:
    """An open destination, locked against a second writer.

    Attributes:
        folder: the destination.
        key: identifies source and options.
        done: whether the destination was complete already.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._state = folder / WORK_FOLDER
        self.done = finished_key(folder) == key

    def records(self, unit: str) -> dict[str, ArrayRecord] | None:
        """The record of a complete unit, or ``None``."""
        try:
            return records_from_json(json.loads((self._state / f"{unit}.json").read_bytes()))
        except (OSError, ValueError):
            return None

    def record(self, unit: str, records: Records) -> None:
        """Marks a unit complete."""
        write_atomic(self._state / f"{unit}.json", json.dumps(records_to_json(records)))

    def forget(self, unit: str) -> None:
        """Marks a unit incomplete again."""
        (self._state / f"{unit}.json").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes everything that no record vouches for: pieces of a killed run, and an earlier conversion."""
        for name in (MANIFEST, INDEX_NAME, "config.json", *COMPANIONS):
            (self.folder / name).unlink(missing_ok=True)
        for unit in (*self.folder.glob("parts/*"), *self.folder.glob("*.safetensors*")):
            if self.records(unit.name) is None:
                shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
        with contextlib.suppress(OSError):  # still in use, or never made
            (self.folder / "parts").rmdir()

    def finish(self) -> None:
        """Removes the state; the destination is complete."""
        shutil.rmtree(self._state)

    def require_space(self, needed: int) -> None:
        """Checks the disk before anything is written.

        Raises:
            CheckpointError: with the bytes that are needed and free.
        """
        free = shutil.disk_usage(self.folder).free
        if needed + _SLACK_BYTES > free:
            raise CheckpointError(
                f"{self.folder} needs {(needed + _SLACK_BYTES) / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free there"
            )


@contextlib.contextmanager
def open_work(folder: Path, key: str, title: str, *, force: bool) -> Iterator[Work]:
    """Opens a destination for a new conversion or to go on with a stopped one.

    Args:
        folder: the destination; made if it is not there.
        key: identifies source and options: a stopped conversion goes on only under the same key.
        title: the same in words, for messages.
        force: replace an earlier conversion of something else.

    Raises:
        CheckpointError: if the folder holds something else, is being written by another process, or cannot be written.
    """
    with explain_writing(folder):
        state = folder / WORK_FOLDER
        fresh = _check_destination(folder, key, force=force)
        state.mkdir(parents=True, exist_ok=True)
        with (state / "lock").open("wb") as lock:
            _lock(lock.fileno(), folder)
            if fresh:
                _start_over(state, key, title)
            yield Work(folder, key)


def finished_key(folder: Path) -> str | None:
    """The key a complete destination was made under; ``None`` if it is none of ours."""
    for name, path in ((MANIFEST, ("source",)), (INDEX_NAME, ("metadata", "source"))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads((folder / name).read_bytes())
            for field in path:
                value = value[field]
            return str(value)
    return None


def _check_destination(folder: Path, key: str, *, force: bool) -> bool:
    """Whether to start from nothing; raises if the folder is not ours to write."""
    if not folder.exists() or not any(folder.iterdir()):
        return True
    running = _running(folder)
    if running.get("key") == key or (not running and finished_key(folder) == key):
        return False
    if not running and finished_key(folder) is None:
        only_state = {path.name for path in folder.iterdir()} <= {WORK_FOLDER}
        if only_state:  # stopped before it began
            return True
        raise CheckpointError(f"{folder} holds other files: choose a new or empty folder")
    if not force:
        held = running.get("title", "a finished conversion")
        raise CheckpointError(
            f"{folder} holds {held}, from another source or with other options: choose another folder, or replace "
            "it with --force (force=True)"
        )
    return True


def _running(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / WORK_FOLDER / _RUN).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _start_over(state: Path, key: str, title: str) -> None:
    # In this order a kill at any point leaves a folder that the same command starts over.
    for record in state.glob("*.json"):
        if record.name != _RUN:
            record.unlink()
    write_atomic(state / _RUN, json.dumps({"key": key, "title": title}))


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another conversion is writing to {folder}") from None
    except OSError:  # a file system without locks
        return


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def explain_writing(folder: Path) -> Iterator[None]:
    """Turns the system's refusals to write into one sentence each; TensorStore reports them as ValueError text."""
    try:
        yield
    except OSError as error:
        raise _explained(folder, error.errno, str(error)) from None
    except ValueError as error:
        code = next((code for code in (*_FULL, *_DENIED, errno.EIO) if os.strerror(code) in str(error)), None)
        if code is None or isinstance(error, GlmError):
            raise
        raise _explained(folder, code, str(error)) from None


def _explained(folder: Path, code: int | None, text: str) -> CheckpointError:
    if code in _FULL:
        return CheckpointError(f"the disk of {folder} is full: make room and run the same command again to go on")
    if code in _DENIED:
        return CheckpointError(f"cannot write to {folder} ({text}): choose a folder that you may write to")
    return CheckpointError(f"writing to {folder} failed ({text}): run the same command again to go on")
