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

from glm_jax.checkpoint.array_record import FLOAT_DTYPES, ArrayRecords
from glm_jax.checkpoint.folder.manifest import MANIFEST_VERSION
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.progress import ProgressCallback, progress_bar
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.validation import validate_weights
from glm_jax.checkpoint.write.conversion_state import ConversionJob, ConversionState, open_conversion
from glm_jax.checkpoint.write.targets import TARGET_TYPES, ConversionTarget, OutputShard, find_corrupt_arrays
from glm_jax.errors import CheckpointError
from glm_jax.memory import format_bytes

OutputFormat = Literal["orbax", "safetensors"]
ProgressBarFactory = Callable[[str, int], contextlib.AbstractContextManager[ProgressCallback]]


@dataclasses.dataclass(frozen=True, slots=True)
class ConversionReport:
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
    to: OutputFormat = "orbax",
    dtype: Literal["bfloat16", "float32"] | None = None,
    check: bool = False,
    force: bool = False,
    progress: bool = False,
    method: str = "",
) -> ConversionReport:
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
    target = TARGET_TYPES[to](source, None if dtype is None else FLOAT_DTYPES[dtype])
    bar: ProgressBarFactory = functools.partial(progress_bar, show=progress)
    title = f"a conversion of {source.info.name} to {to}, dtype {dtype or 'unchanged'}{method}"
    with open_conversion(
        folder, ConversionJob(_conversion_key(source, to, dtype), title, source.mtimes_ns()), force=force
    ) as work:
        source.start_conversion(folder, keep_all=to == "safetensors")
        if progress and (needed := source.memory_bytes()):
            print(
                f"learning how to round, one layer at a time, takes about {format_bytes(needed)} of memory",
                file=sys.stderr,
            )
        if check:
            # Of a source that is quantized on the way, the values before: codes are always finite.
            given = source.unquantized()
            with bar("checking", given.total_bytes()) as advance:
                validate_weights(given, advance)
        if work.was_complete:
            _restore_records(work, target, bar, check=check)
        return _run_conversion(work, target, bar, source)


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


def _conversion_key(source: WeightSource, to: str, dtype: str | None) -> str:
    fields = {"source": source.fingerprint(), "to": to, "dtype": dtype, "version": MANIFEST_VERSION}
    # A changed config.json makes another model of the same weights.
    fields["config"] = [repr(source.cfg), source.hf_config]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _restore_records(work: ConversionState, target: ConversionTarget, bar: ProgressBarFactory, *, check: bool) -> None:
    """Gives the units of a finished folder their records back; those that are missing or damaged get none."""
    kept = target.load_records(work.folder)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bar("comparing", _total_bytes(target))) if check else None
        for unit in target.shards:
            records = kept.get(unit.name, {})
            sound = unit.is_complete(work.folder, records)
            if sound and advance:
                records = unit.compute_records()
                sound = not find_corrupt_arrays(unit, work.folder, records, advance)
            if sound:
                work.save_records(unit.name, records)
            else:
                work.discard_records(unit.name)


def _run_conversion(
    work: ConversionState, target: ConversionTarget, bar: ProgressBarFactory, source: WeightSource
) -> ConversionReport:
    pending = [unit for unit in target.shards if work.load_records(unit.name) is None]
    if work.was_complete and not pending:
        work.remove_stale()
        records = {unit.name: work.load_records(unit.name) or {} for unit in target.shards}
    else:
        work.mark_incomplete()
        work.remove_stale()
        _write_shards(work, pending, bar, source)
        records = _verify_shards(work, target, bar, _total_bytes(target))
    target.finalize(work.folder, work.job.key, records)
    work.mark_complete()
    said = source.info.notes + target.notes
    notes = (*said, *source.conversion_notes())
    return ConversionReport(work.folder, _total_bytes(target), len(pending), len(target.shards) - len(pending), notes)


def _total_bytes(target: ConversionTarget) -> int:
    return sum(unit.nbytes for unit in target.shards)


def _write_shards(
    work: ConversionState, pending: Sequence[OutputShard], bar: ProgressBarFactory, source: WeightSource
) -> None:
    needed = sum(unit.nbytes for unit in pending)
    if pending:
        source.require_memory()
    with bar("converting", needed) as advance:
        for unit in pending:
            work.require_disk_space(needed + source.state_bytes())
            needed -= unit.nbytes
            meter = _ProgressMeter(advance)
            source.on_progress(functools.partial(meter.advance_early, unit.nbytes))
            work.save_records(unit.name, unit.write(work.folder, meter))


class _ProgressMeter:
    """Progress of a unit that takes long to make before its first byte is written.

    Args:
        advance: takes bytes done.
    """

    def __init__(self, advance: ProgressCallback) -> None:
        self._advance, self._advanced = advance, 0

    def advance_early(self, nbytes: int, share: float) -> None:
        """Counts a share of the unit's bytes ahead of time."""
        count = min(int(share * nbytes), nbytes - self._advanced)
        self._advanced += count
        self._advance(count)

    def __call__(self, count: int) -> None:
        """Counts bytes written, but for those that were counted already."""
        covered = min(count, self._advanced)
        self._advanced -= covered
        if count > covered:
            self._advance(count - covered)


def _verify_shards(
    work: ConversionState, target: ConversionTarget, bar: ProgressBarFactory, total: int
) -> dict[str, ArrayRecords]:
    records: dict[str, ArrayRecords] = {}
    wrong: list[str] = []
    with bar("verifying", total) as advance:
        for unit in target.shards:
            records[unit.name] = work.load_records(unit.name) or {}
            if bad := find_corrupt_arrays(unit, work.folder, records[unit.name], advance):
                work.discard_records(unit.name)
                wrong += bad
    if wrong:
        raise CheckpointError(
            f"arrays that do not read back as they were written: {format_names(wrong)}; is the disk sound? "
            "Run the same command again to write them anew"
        )
    return records
