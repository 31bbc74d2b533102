"""The state of a conversion: a hidden folder inside the destination that lets a killed conversion resume.

``.convert/run.json`` describes the job. ``.convert/<shard>.json`` is written when a shard (a layer checkpoint or a
safetensors file) is complete, and holds the hashes of its arrays. A shard without a record is written again. A lock
file keeps out a second writer on systems that have ``fcntl``; elsewhere nothing does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not available on every system
    fcntl = None

from glm_jax.checkpoint.array_record import ArrayRecord, ArrayRecords, records_from_json, records_to_json
from glm_jax.checkpoint.asset_files import ASSET_FILES
from glm_jax.checkpoint.atomic_write import write_atomic
from glm_jax.checkpoint.folder.layout import STATE_FOLDER
from glm_jax.checkpoint.folder.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.safetensors.reader import INDEX_NAME
from glm_jax.checkpoint.write.errors import wrap_open_errors, wrap_write_errors
from glm_jax.errors import CheckpointError

_JOB_FILE = "run.json"
_COMPLETION_FILES = (MANIFEST_NAME, INDEX_NAME)  # either one marks a folder complete
_SLACK_BYTES = 32 << 20  # for metadata and partly filled disk blocks


@dataclasses.dataclass(frozen=True, slots=True)
class ConversionJob:
    """Identity of a conversion.

    Attributes:
        key: Hash of source and options; a stopped conversion resumes only under the same key.
        title: Description of the job for messages.
        files: Modification time of each source file in nanoseconds; a stopped conversion resumes only if no file has
            changed. Finished folders do not record it.
    """

    key: str
    title: str
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)


class ConversionState:
    """An open destination, locked against a second writer.

    Attributes:
        folder: The destination.
        job: The conversion that is written there.
        was_complete: Whether the destination was already complete when it was opened.
    """

    def __init__(self, folder: Path, job: ConversionJob) -> None:
        self.folder, self.job = folder, job
        self._state = folder / STATE_FOLDER
        self.was_complete = read_finished_key(folder) == job.key

    def load_records(self, shard_name: str) -> dict[str, ArrayRecord] | None:
        """Returns the records of a complete shard; ``None`` for an incomplete one."""
        try:
            return records_from_json(json.loads((self._state / f"{shard_name}.json").read_bytes()))
        except (OSError, ValueError):
            return None

    def save_records(self, shard_name: str, records: ArrayRecords) -> None:
        """Marks a shard complete."""
        write_atomic(self._state / f"{shard_name}.json", json.dumps(records_to_json(records)))

    def discard_records(self, shard_name: str) -> None:
        """Marks a shard incomplete again."""
        (self._state / f"{shard_name}.json").unlink(missing_ok=True)

    def mark_incomplete(self) -> None:
        """Turns the folder into an unfinished conversion, which it stays if the process is killed."""
        _write_job(self._state, self.job)
        for name in (*_COMPLETION_FILES, "config.json"):
            (self.folder / name).unlink(missing_ok=True)

    def remove_stale(self) -> None:
        """Removes all shards without a record: fragments of a killed process, and earlier conversions."""
        for shard in (*self.folder.glob("parts/*"), *self.folder.glob("model-*-of-*.safetensors*")):
            if self.load_records(shard.name) is None:
                shutil.rmtree(shard) if shard.is_dir() else shard.unlink()
        with contextlib.suppress(OSError):  # not empty, or absent
            (self.folder / "parts").rmdir()

    def mark_complete(self) -> None:
        """Removes the state folder, which completes the conversion."""
        shutil.rmtree(self._state)

    def require_disk_space(self, nbytes: int) -> None:
        """Checks the free disk space before writing.

        Args:
            nbytes: Bytes that will be written.

        Raises:
            CheckpointError: if space is too small; states the bytes needed and free.
        """
        free = shutil.disk_usage(self.folder).free
        if nbytes + _SLACK_BYTES > free:
            raise CheckpointError(
                f"{self.folder} needs {(nbytes + _SLACK_BYTES) / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free there"
            )


@contextlib.contextmanager
def open_conversion(folder: Path, job: ConversionJob, *, force: bool) -> Iterator[ConversionState]:
    """Opens a destination to start a conversion, to resume a stopped one, or to repair a finished one.

    Args:
        folder: The destination; created if it does not exist.
        job: The conversion to write.
        force: Whether to start over and replace any conversion in the folder.

    Raises:
        CheckpointError: if the folder holds something else, is being written by another process, or is not writable.
    """
    state = folder / STATE_FOLDER
    with wrap_open_errors(folder):
        fresh = _check_destination(folder, job, force=force)
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("wb")
    with wrap_write_errors(folder, force=force), lock:
        _lock(lock.fileno(), folder)
        if fresh:
            _start_over(folder, job)
        yield ConversionState(folder, job)


def read_finished_key(folder: Path) -> str | None:
    """Returns the job key of a finished conversion; ``None`` if the folder does not hold one."""
    manifest, index = (_read_json_object(folder / name) for name in _COMPLETION_FILES)
    metadata = index.get("metadata")
    keys = [manifest.get("source")] if manifest.get("format") == MANIFEST_FORMAT else []
    keys += [metadata.get("source")] if isinstance(metadata, dict) else []
    # Another program's index may have a "source" too, so only hashes count.
    return next((key for key in keys if isinstance(key, str) and re.fullmatch(r"[0-9a-f]{64}", key)), None)


def _check_destination(folder: Path, job: ConversionJob, *, force: bool) -> bool:
    """Returns whether to start from nothing; raises if the folder must not be written."""
    if not folder.exists() or not any(folder.iterdir()):
        return True
    running, finished_key = _read_json_object(folder / STATE_FOLDER / _JOB_FILE), read_finished_key(folder)
    if not running and finished_key is None:
        if {path.name for path in folder.iterdir()} <= {STATE_FOLDER}:  # stopped before the job was recorded
            return True
        raise CheckpointError(f"{folder} holds other files: choose a new or empty folder")
    if force:
        return True
    if running.get("key", finished_key) != job.key:
        title = printable(str(running.get("title", "a finished conversion")), 500)
        raise CheckpointError(
            f"{folder} holds {title}, from another source or with other options: choose another folder, or replace "
            "it with --force (force=True)"
        )
    if finished_key != job.key:
        _check_unchanged(folder, running.get("files"), job.files)
    return False


def _check_unchanged(folder: Path, before: object, now: Mapping[str, int]) -> None:
    recorded = before if isinstance(before, dict) else {}
    changed = [name for name, time in now.items() if recorded.get(name) != time]
    if changed:
        raise CheckpointError(
            f"{folder} holds a stopped conversion, and since then {format_names([*map(printable, changed)])} changed: "
            "start over with --force (force=True)"
        )


def _read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _start_over(folder: Path, job: ConversionJob) -> None:
    # In this order, a kill at any point leaves a folder that the same command starts over.
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
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another conversion is writing to {folder}") from None
    except OSError:  # a file system without locks
        return
