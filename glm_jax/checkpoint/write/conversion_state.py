"""The state of a conversion: a hidden folder inside the destination that makes it safe to kill and run again.

``.convert/run.json`` says what is being converted and how; ``.convert/<unit>.json`` is written when a unit (a part, a
shard) is complete and holds the hashes of its arrays. A unit without its record does not count and is written again.
A lock keeps a second writer away, on systems that have ``fcntl``; elsewhere nothing does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.array_record import ArrayRecord, ArrayRecords, records_from_json, records_to_json
from glm_jax.checkpoint.atomic_write import write_atomic
from glm_jax.checkpoint.folder.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.safetensors.reader import INDEX_NAME
from glm_jax.checkpoint.sources.base import ASSET_FILES
from glm_jax.errors import CheckpointError, GlmError

STATE_FOLDER = ".convert"
_JOB_FILE = "run.json"
_COMPLETION_FILES = (MANIFEST_NAME, INDEX_NAME)  # a folder with one of them is complete
_SLACK_BYTES = 32 << 20  # metadata, and blocks that files do not fill


@dataclasses.dataclass(frozen=True, slots=True)
class ConversionJob:
    """What is to be converted, and how.

    Attributes:
        key: identifies source and options: a stopped conversion goes on only under the same key.
        title: the same in words, for messages.
        files: when the source's files were last changed; a stopped conversion goes on only if none has been since. Of
            a run alone: a finished folder knows nothing of time.
    """

    key: str
    title: str
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)


class ConversionState:
    """An open destination, locked against a second writer.

    Attributes:
        folder: the destination.
        job: what is written there.
        was_complete: whether the destination was complete already.
    """

    def __init__(self, folder: Path, job: ConversionJob) -> None:
        self.folder, self.job = folder, job
        self._state = folder / STATE_FOLDER
        self.was_complete = read_finished_key(folder) == job.key

    def load_records(self, shard_name: str) -> dict[str, ArrayRecord] | None:
        """The record of a complete unit, or ``None``."""
        try:
            return records_from_json(json.loads((self._state / f"{shard_name}.json").read_bytes()))
        except (OSError, ValueError):
            return None

    def save_records(self, shard_name: str, records: ArrayRecords) -> None:
        """Marks a unit complete."""
        write_atomic(self._state / f"{shard_name}.json", json.dumps(records_to_json(records)))

    def discard_records(self, shard_name: str) -> None:
        """Marks a unit incomplete again."""
        (self._state / f"{shard_name}.json").unlink(missing_ok=True)

    def mark_incomplete(self) -> None:
        """Makes the folder an unfinished one, which it stays if this run is killed."""
        _write_job(self._state, self.job)
        for name in (*_COMPLETION_FILES, "config.json"):
            (self.folder / name).unlink(missing_ok=True)

    def remove_stale(self) -> None:
        """Removes every unit that no record vouches for: pieces of a killed run, and an earlier conversion."""
        for unit in (*self.folder.glob("parts/*"), *self.folder.glob("model-*-of-*.safetensors*")):
            if self.load_records(unit.name) is None:
                shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
        with contextlib.suppress(OSError):  # still in use, or never made
            (self.folder / "parts").rmdir()

    def mark_complete(self) -> None:
        """Removes the state; the destination is complete."""
        shutil.rmtree(self._state)

    def require_disk_space(self, needed: int) -> None:
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
def open_conversion(folder: Path, job: ConversionJob, *, force: bool) -> Iterator[ConversionState]:
    """Opens a destination for a new conversion, to go on with a stopped one, or to look at a finished one again.

    Args:
        folder: the destination; made if it is not there.
        job: what is to be written.
        force: start over, replacing whatever conversion is there.

    Raises:
        CheckpointError: if the folder holds something else, is being written by another process, or cannot be written.
    """
    state = folder / STATE_FOLDER
    with _wrap_open_errors(folder):
        fresh = _check_destination(folder, job, force=force)
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("wb")
    with wrap_write_errors(folder, force=force), lock:
        _lock(lock.fileno(), folder)
        if fresh:
            _start_over(folder, job)
        yield ConversionState(folder, job)


def read_finished_key(folder: Path) -> str | None:
    """The key a complete destination was made under; ``None`` if it is none of ours."""
    manifest, index = (_json_object(folder / name) for name in _COMPLETION_FILES)
    metadata = index.get("metadata")
    keys = [manifest.get("source")] if manifest.get("format") == MANIFEST_FORMAT else []
    keys += [metadata.get("source")] if isinstance(metadata, dict) else []
    # Another program's index may name its source too.
    return next((key for key in keys if isinstance(key, str) and re.fullmatch(r"[0-9a-f]{64}", key)), None)


def _check_destination(folder: Path, job: ConversionJob, *, force: bool) -> bool:
    """Whether to start from nothing; raises if the folder is not ours to write."""
    if not folder.exists() or not any(folder.iterdir()):
        return True
    running, finished = _json_object(folder / STATE_FOLDER / _JOB_FILE), read_finished_key(folder)
    if not running and finished is None:
        only_state = {path.name for path in folder.iterdir()} <= {STATE_FOLDER}
        if only_state:  # stopped before it began
            return True
        raise CheckpointError(f"{folder} holds other files: choose a new or empty folder")
    if force:
        return True
    if running.get("key", finished) != job.key:
        held = printable(str(running.get("title", "a finished conversion")), 500)
        raise CheckpointError(
            f"{folder} holds {held}, from another source or with other options: choose another folder, or replace "
            "it with --force (force=True)"
        )
    if finished != job.key:
        _check_unchanged(folder, running.get("files"), job.files)
    return False


def _check_unchanged(folder: Path, before: Any, now: Mapping[str, int]) -> None:
    before = before if isinstance(before, dict) else {}
    changed = [name for name, time in now.items() if before.get(name) != time]
    if changed:
        raise CheckpointError(
            f"{folder} holds a stopped conversion, and since then {format_names([*map(printable, changed)])} changed: "
            "start over with --force (force=True)"
        )


def _json_object(path: Path) -> dict[str, Any]:
    """An object from a file; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _start_over(folder: Path, job: ConversionJob) -> None:
    # In this order a kill at any point leaves a folder that the same command starts over.
    state = folder / STATE_FOLDER
    for record in state.glob("*.json"):
        if record.name != _JOB_FILE:
            record.unlink()
    _write_job(state, job)
    for name in (*_COMPLETION_FILES, *ASSET_FILES):
        (folder / name).unlink(missing_ok=True)


def _write_job(state: Path, job: ConversionJob) -> None:
    write_atomic(state / _JOB_FILE, json.dumps(dataclasses.asdict(job)))


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl  # not every system has it
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another conversion is writing to {folder}") from None
    except OSError:  # a file system without locks
        return


_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ACCESS_DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def _wrap_open_errors(folder: Path) -> Iterator[None]:
    """A folder that cannot even be made: doing the same again would not help."""
    try:
        yield
    except OSError as error:
        if error.errno in (*_DISK_FULL_ERRNOS, *_ACCESS_DENIED_ERRNOS):
            raise _write_error(folder, error.errno, str(error), "run the same command again") from None
        reason = error.strerror or str(error)
        raise CheckpointError(f"{folder} cannot be made a folder ({reason}): choose another destination") from None


@contextlib.contextmanager
def wrap_write_errors(folder: Path, *, force: bool = False) -> Iterator[None]:
    """Turns the system's refusals to write into one sentence each; TensorStore reports them as ValueError text."""
    # With --force the same command starts over.
    again = f"run the same command again{' without --force' if force else ''} to go on"
    try:
        yield
    except OSError as error:
        raise _write_error(folder, error.errno, str(error), again) from None
    except ValueError as error:
        code = next(
            (
                code
                for code in (*_DISK_FULL_ERRNOS, *_ACCESS_DENIED_ERRNOS, errno.EIO)
                if os.strerror(code) in str(error)
            ),
            None,
        )
        if code is None or isinstance(error, GlmError):
            raise
        raise _write_error(folder, code, str(error), again) from None


def _write_error(folder: Path, code: int | None, text: str, again: str) -> CheckpointError:
    if code in _DISK_FULL_ERRNOS:
        return CheckpointError(f"the disk of {folder} is full: make room and {again}")
    if code in _ACCESS_DENIED_ERRNOS:
        return CheckpointError(f"cannot write to {folder} ({text}): choose a folder that you may write to")
    return CheckpointError(f"writing to {folder} failed ({text}): {again}")
