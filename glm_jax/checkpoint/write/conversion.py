"""Writes a weight source to a folder: holds one layer at a time, resumes after a kill, and verifies at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES, ArrayRecords
from glm_jax.checkpoint.folder.manifest import MANIFEST_VERSION
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.progress import ProgressCallback, progress_bar
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.validation import validate_weights
from glm_jax.checkpoint.write.conversion_state import ConversionJob, ConversionState, open_conversion
from glm_jax.checkpoint.write.orbax_target import OrbaxTarget
from glm_jax.checkpoint.write.safetensors_target import SafetensorsTarget
from glm_jax.checkpoint.write.targets import ConversionTarget, OutputShard, find_corrupt_arrays
from glm_jax.errors import CheckpointError
from glm_jax.memory import format_bytes

OutputFormat = Literal["orbax", "safetensors"]
ProgressBarFactory = Callable[[str, int], contextlib.AbstractContextManager[ProgressCallback]]

_LOGGER = logging.getLogger(__name__)
_TARGET_TYPES: dict[str, Callable[[WeightSource, np.dtype[Any] | None], ConversionTarget]] = {
    "orbax": OrbaxTarget,
    "safetensors": SafetensorsTarget,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ConversionReport:
    """Result of a conversion.

    Attributes:
        folder: The destination.
        nbytes: Size of all arrays in bytes.
        written: Number of shards that this call wrote.
        kept: Number of shards that were already complete.
        notes: Sentences for the user about the source and about its weights in the destination.
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
    """Writes all weights of a source to a folder; after a kill, the same call resumes.

    Args:
        source: The weights.
        destination: New or empty folder, or the destination of an earlier call. A stopped conversion resumes; in a
            finished one, shards that are missing or have the wrong size are written again.
        to: "orbax" for a converted folder, which loads fast and in slices; "safetensors" for a Hugging Face folder.
        dtype: Dtype of weights that are not quantized; ``None`` keeps each array's own.
        check: Whether to reject NaN and infinite weights, and to compare every byte of a finished conversion with the
            source; shards that differ are written again.
        force: Whether to start over and replace any conversion in the destination.
        progress: Whether to show progress on stderr.
        method: How the source quantizes, as a phrase such as ", quantized int4 by mse"; part of the job's title.

    Raises:
        CheckpointError: if the folder is the source's own or cannot be written, the disk is full, or arrays do not read
            back as written.
        MemoryPlanError: if the source computes its weights and the largest layer does not fit in memory.
    """
    folder = resolve_destination(destination)
    reject_source_folder(source, folder)
    target = _TARGET_TYPES[to](source, None if dtype is None else FLOAT_DTYPES[dtype])
    bar: ProgressBarFactory = functools.partial(progress_bar, show=progress)
    title = f"a conversion of {source.info.name} to {to}, dtype {dtype or 'unchanged'}{method}"
    job = ConversionJob(_conversion_key(source, to, dtype), title, source.mtimes_ns())
    with open_conversion(folder, job, force=force) as state:
        source.start_conversion(folder, keep_all=to == "safetensors")
        if progress and (needed := source.memory_bytes()):
            _LOGGER.info("learned rounding needs about %s of memory", format_bytes(needed))
        if check:
            # The unquantized values are checked, because quantized ones are always finite.
            unquantized = source.unquantized()
            with bar("checking", unquantized.total_bytes()) as advance:
                validate_weights(unquantized, advance)
        if state.was_complete:
            _restore_records(state, target, bar, check=check)
        return _run_conversion(state, target, bar, source)


def resolve_destination(destination: str | Path) -> Path:
    """Returns the absolute path of a destination folder.

    Raises:
        CheckpointError: if the text is not a valid path.
    """
    text = os.fspath(destination)
    if not text:
        raise CheckpointError("no destination given: name a new or empty folder")
    try:
        return Path(os.path.expanduser(text)).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL character, or a loop of links
        raise CheckpointError(f"{printable(text)} cannot be a folder ({printable(str(error))})") from None


def reject_source_folder(source: WeightSource, folder: Path) -> None:
    """Checks that a destination is not the folder of its source, whose files a conversion would replace.

    Args:
        source: The weights. Parameters in memory have the folder that supplies their tokenizer.
        folder: Absolute path of the destination.

    Raises:
        CheckpointError: if it is.
    """
    if source.info.folder and source.info.folder.resolve() == folder:
        raise CheckpointError(f"{folder} is the source: choose another destination")


def _conversion_key(source: WeightSource, to: str, dtype: str | None) -> str:
    fields = {"source": source.fingerprint(), "to": to, "dtype": dtype, "version": MANIFEST_VERSION}
    # A changed config.json makes another model of the same weights.
    fields["config"] = [repr(source.cfg), source.hf_config]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _restore_records(state: ConversionState, target: ConversionTarget, bar: ProgressBarFactory, *, check: bool) -> None:
    """Saves the records of a finished folder's intact shards; missing and damaged shards get none."""
    kept_records = target.load_records(state.folder)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bar("comparing", _total_bytes(target))) if check else None
        for shard in target.shards:
            records = kept_records.get(shard.name, {})
            intact = shard.is_complete(state.folder, records)
            if intact and advance:
                records = shard.compute_records()
                intact = not find_corrupt_arrays(shard, state.folder, records, advance)
            if intact:
                state.save_records(shard.name, records)
            else:
                state.discard_records(shard.name)


def _run_conversion(
    state: ConversionState, target: ConversionTarget, bar: ProgressBarFactory, source: WeightSource
) -> ConversionReport:
    pending = [shard for shard in target.shards if state.load_records(shard.name) is None]
    if state.was_complete and not pending:
        state.remove_stale()
        records = {shard.name: state.load_records(shard.name) or {} for shard in target.shards}
    else:
        state.mark_incomplete()
        state.remove_stale()
        _write_shards(state, pending, bar, source)
        records = _verify_shards(state, target, bar)
    target.finalize(state.folder, state.job.key, records)
    state.mark_complete()
    notes = (*source.info.notes, *target.notes, *source.conversion_notes())
    return ConversionReport(state.folder, _total_bytes(target), len(pending), len(target.shards) - len(pending), notes)


def _total_bytes(target: ConversionTarget) -> int:
    return sum(shard.nbytes for shard in target.shards)


def _write_shards(
    state: ConversionState, pending: Sequence[OutputShard], bar: ProgressBarFactory, source: WeightSource
) -> None:
    remaining = sum(shard.nbytes for shard in pending)
    if pending:
        source.require_memory()
    with bar("converting", remaining) as advance:
        for shard in pending:
            state.require_disk_space(remaining + source.state_bytes())
            remaining -= shard.nbytes
            meter = _ProgressMeter(advance)
            source.on_progress(functools.partial(meter.advance_early, shard.nbytes))
            state.save_records(shard.name, shard.write(state.folder, meter))


class _ProgressMeter:
    """Progress of a shard whose computation takes long before its first byte is written.

    Args:
        advance: Callback that receives finished bytes.
    """

    def __init__(self, advance: ProgressCallback) -> None:
        self._advance, self._advanced = advance, 0

    def advance_early(self, nbytes: int, fraction: float) -> None:
        """Counts a fraction of the shard's bytes ahead of time."""
        count = min(int(fraction * nbytes), nbytes - self._advanced)
        self._advanced += count
        self._advance(count)

    def __call__(self, count: int) -> None:
        """Counts written bytes, except those that were counted ahead of time."""
        covered = min(count, self._advanced)
        self._advanced -= covered
        if count > covered:
            self._advance(count - covered)


def _verify_shards(
    state: ConversionState, target: ConversionTarget, bar: ProgressBarFactory
) -> dict[str, ArrayRecords]:
    """Reads all shards back; returns their records, or raises and marks corrupt shards incomplete."""
    records: dict[str, ArrayRecords] = {}
    corrupt: list[str] = []
    with bar("verifying", _total_bytes(target)) as advance:
        for shard in target.shards:
            records[shard.name] = state.load_records(shard.name) or {}
            if names := find_corrupt_arrays(shard, state.folder, records[shard.name], advance):
                state.discard_records(shard.name)
                corrupt += names
    if corrupt:
        raise CheckpointError(
            f"these arrays do not read back as they were written: {format_names(corrupt)}; check the disk, then run "
            "the same command again to write them anew"
        )
    return records
