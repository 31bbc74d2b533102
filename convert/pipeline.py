"""Conversion as a stream: one part in memory at a time, safe to kill, verified at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from convert.checks import check_finite
from convert.manifest import DTYPES, FORMAT_VERSION, Records
from convert.progress import Advance, progress_bar
from convert.reader import listing
from convert.source import WeightSource
from convert.sources import open_source
from convert.targets import TARGETS, Target, verify
from convert.work import Work, open_work
from glm_jax.errors import CheckpointError

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
        notes: what the source had to say.
    """

    folder: Path
    nbytes: int
    written: int
    kept: int
    notes: tuple[str, ...]


def convert(
    source: str | Path | WeightSource,
    destination: str | Path,
    *,
    to: Form = "orbax",
    dtype: Literal["bfloat16", "float32"] | None = None,
    check: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Report:
    """Converts a checkpoint; the same call after a kill goes on with the part that was being written.

    Args:
        source: anything that :func:`convert.sources.open_source` takes.
        destination: new or empty folder, or that of a stopped conversion.
        to: "orbax" (parts that load fast and in slices) or "safetensors" (a Hugging Face folder).
        dtype: of the weights; ``None`` keeps every array's own.
        check: refuse weights that are NaN or infinite.
        force: replace an earlier conversion in the destination.
        progress: show it on stderr.

    Raises:
        CheckpointError: for bad sources, folders that cannot be written, full disks, and arrays that do not read back.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """
    weights = source if isinstance(source, WeightSource) else open_source(source, dtype=dtype)
    folder = Path(os.path.expanduser(destination)).resolve()
    if weights.info.folder and weights.info.folder.resolve() == folder:
        raise CheckpointError(f"{folder} is the source: choose another destination")
    target = TARGETS[to](weights, None if dtype is None else DTYPES[dtype])
    bar: Bar = functools.partial(progress_bar, show=progress)
    title = f"a conversion of {weights.info.name} to {to}, dtype {dtype or 'unchanged'}"
    with open_work(folder, _key(weights, to, dtype), title, force=force) as work:
        if check:
            with bar("checking", weights.total_bytes()) as advance:
                check_finite(weights, advance)
        return _run(work, target, bar, weights.info.notes)


def _key(source: WeightSource, to: str, dtype: str | None) -> str:
    fields = {"source": source.info.fingerprint, "to": to, "dtype": dtype, "version": FORMAT_VERSION}
    # A changed config.json makes another model of the same weights.
    fields["config"] = [repr(source.cfg), source.hf_config]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _run(work: Work, target: Target, bar: Bar, notes: tuple[str, ...]) -> Report:
    total = sum(unit.nbytes for unit in target.units)
    if work.done:
        work.finish()
        return Report(work.folder, total, 0, len(target.units), notes)
    work.sweep()
    pending = [unit for unit in target.units if work.records(unit.name) is None]
    needed = sum(unit.nbytes for unit in pending)
    with bar("converting", needed) as advance:
        for unit in pending:
            work.require_space(needed)
            needed -= unit.nbytes
            work.record(unit.name, unit.write(work.folder, advance))
    records = _verified(work, target, bar, total)
    target.finish(work.folder, work.key, records)
    work.finish()
    return Report(work.folder, total, len(pending), len(target.units) - len(pending), notes)


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
