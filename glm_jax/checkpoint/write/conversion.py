"""Writes a weight source into a folder: one part in memory at a time, safe to kill, verified at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from glm_jax.checkpoint.folder.manifest import DTYPES, FORMAT_VERSION, Records
from glm_jax.checkpoint.progress import Advance, progress_bar
from glm_jax.checkpoint.safetensors.header import printable
from glm_jax.checkpoint.safetensors.reader import listing
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.validation import check_finite
from glm_jax.checkpoint.write.conversion_state import Job, Work, open_work
from glm_jax.checkpoint.write.targets import TARGETS, Target, Unit, verify
from glm_jax.errors import CheckpointError
from glm_jax.memory import in_gb

Form = Literal["orbax", "safetensors"]
Bar = Callable[[str, int], contextlib.AbstractContextManager[Advance]]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        folder: the destination.
        nbytes: bytes of all arrays.
        written: units written by this run.
        kept: units that an earlier, stopped run had finished.
        notes: what there is to say of the source, and of what became of its weights.
    """

    folder: Path
    nbytes: int
    written: int
    kept: int
    notes: tuple[str, ...]


def write_checkpoint(
    source: WeightSource,
    destination: str | Path,
    *,
    to: Form = "orbax",
    dtype: Literal["bfloat16", "float32"] | None = None,
    check: bool = False,
    force: bool = False,
    progress: bool = False,
    method: str = "",
) -> Report:
    """Writes all weights of a source; the same call after a kill goes on with the part that was being written.

    Args:
        source: the weights.
        destination: new or empty folder, or that of an earlier run: a stopped conversion goes on, and of a finished
            one what is missing or of the wrong size is written again.
        to: "orbax" (parts that load fast and in slices) or "safetensors" (a Hugging Face folder).
        dtype: of the weights that are not quantized; ``None`` keeps every array's own.
        check: refuse weights that are NaN or infinite; compare every byte of a finished conversion with the source, and
            write again what differs.
        force: start over, replacing whatever conversion is in the destination.
        progress: show it on stderr.
        method: how the source quantizes on the way, in words, for messages about the folder.

    Raises:
        CheckpointError: for folders that cannot be written, full disks, and arrays that do not read back.
        MemoryPlanError: if the source computes its weights and the largest layer does not fit.
    """
    folder = resolve_destination(destination)
    target = TARGETS[to](source, None if dtype is None else DTYPES[dtype])
    bar: Bar = functools.partial(progress_bar, show=progress)
    title = f"a conversion of {source.info.name} to {to}, dtype {dtype or 'unchanged'}{method}"
    with open_work(folder, Job(_key(source, to, dtype), title, source.modified()), force=force) as work:
        source.start_conversion(folder, keep_all=to == "safetensors")
        if progress and (needed := source.memory_bytes()):
            print(f"learning how to round, one layer at a time, takes about {in_gb(needed)} of memory", file=sys.stderr)
        if check:
            # Of a source that is quantized on the way, the values before: codes are always finite.
            given = source.unquantized()
            with bar("checking", given.total_bytes()) as advance:
                check_finite(given, advance)
        if work.done:
            _recall(work, target, bar, check=check)
        return _run(work, target, bar, source)


def resolve_destination(destination: str | Path) -> Path:
    """The absolute path of a folder to write.

    Raises:
        CheckpointError: if the text names no folder.
    """
    text = os.fspath(destination)
    if not text:
        raise CheckpointError("no destination given: name a new or empty folder")
    try:
        return Path(os.path.expanduser(text)).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, a loop of links
        raise CheckpointError(f"{printable(text)} cannot be a folder ({printable(str(error))})") from None


def _key(source: WeightSource, to: str, dtype: str | None) -> str:
    fields = {"source": source.fingerprint(), "to": to, "dtype": dtype, "version": FORMAT_VERSION}
    # A changed config.json makes another model of the same weights.
    fields["config"] = [repr(source.cfg), source.hf_config]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _recall(work: Work, target: Target, bar: Bar, *, check: bool) -> None:
    """Gives the units of a finished folder their records back; those that are missing or damaged get none."""
    kept = target.records(work.folder)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bar("comparing", _total(target))) if check else None
        for unit in target.units:
            records = kept.get(unit.name, {})
            sound = unit.stands(work.folder, records)
            if sound and advance:
                records = unit.record()
                sound = not verify(unit, work.folder, records, advance)
            if sound:
                work.record(unit.name, records)
            else:
                work.forget(unit.name)


def _run(work: Work, target: Target, bar: Bar, source: WeightSource) -> Report:
    pending = [unit for unit in target.units if work.records(unit.name) is None]
    if work.done and not pending:
        work.sweep()
        records = {unit.name: work.records(unit.name) or {} for unit in target.units}
    else:
        work.begin()
        work.sweep()
        _write(work, pending, bar, source)
        records = _verified(work, target, bar, _total(target))
    target.finish(work.folder, work.job.key, records)
    work.finish()
    said = source.info.notes + target.notes
    notes = (*said, *source.conversion_notes())
    return Report(work.folder, _total(target), len(pending), len(target.units) - len(pending), notes)


def _total(target: Target) -> int:
    return sum(unit.nbytes for unit in target.units)


def _write(work: Work, pending: Sequence[Unit], bar: Bar, source: WeightSource) -> None:
    needed = sum(unit.nbytes for unit in pending)
    if pending:
        source.require_memory()
    with bar("converting", needed) as advance:
        for unit in pending:
            work.require_space(needed + source.state_bytes())
            needed -= unit.nbytes
            meter = _Meter(advance)
            source.on_progress(functools.partial(meter.early, unit.nbytes))
            work.record(unit.name, unit.write(work.folder, meter))


class _Meter:
    """Progress of a unit that takes long to make before its first byte is written.

    Args:
        advance: takes bytes done.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance, self._given = advance, 0

    def early(self, nbytes: int, share: float) -> None:
        """Counts a share of the unit's bytes ahead of time."""
        count = min(int(share * nbytes), nbytes - self._given)
        self._given += count
        self._advance(count)

    def __call__(self, count: int) -> None:
        """Counts bytes written, but for those that were counted already."""
        covered = min(count, self._given)
        self._given -= covered
        if count > covered:
            self._advance(count - covered)


def _verified(work: Work, target: Target, bar: Bar, total: int) -> dict[str, Records]:
    records: dict[str, Records] = {}
    wrong: list[str] = []
    with bar("verifying", total) as advance:
        for unit in target.units:
            records[unit.name] = work.records(unit.name) or {}
            if bad := verify(unit, work.folder, records[unit.name], advance):
                work.forget(unit.name)
                wrong += bad
    if wrong:
        raise CheckpointError(
            f"arrays that do not read back as they were written: {listing(wrong)}; is the disk sound? "
            "Run the same command again to write them anew"
        )
    return records
