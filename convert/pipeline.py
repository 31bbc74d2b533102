"""Conversion as a stream: one part in memory at a time, safe to kill, verified at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from convert.calibrate import CalibratedSource, Calibration
from convert.calibrate.signround import Settings
from glm_jax.checkpoint.folder.manifest import DTYPES, FORMAT_VERSION, Records
from glm_jax.checkpoint.progress import Advance, progress_bar
from glm_jax.checkpoint.safetensors.header import printable
from glm_jax.checkpoint.safetensors.reader import listing
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.quantized import Requantised
from glm_jax.checkpoint.validation import check_finite
from glm_jax.checkpoint.write.conversion_state import Job, Work, open_work
from glm_jax.checkpoint.write.pack_quantized import NOT_LINEAR
from glm_jax.checkpoint.write.targets import TARGETS, Target, Unit, verify
from glm_jax.errors import CheckpointError, QuantError
from glm_jax.memory import in_gb
from glm_jax.weights import QuantRules
from glm_jax.weights.quantization import Method

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


def convert(
    source: str | Path | WeightSource,
    destination: str | Path,
    *,
    to: Form = "orbax",
    dtype: Literal["bfloat16", "float32"] | None = None,
    quantize: str | QuantRules | None = None,
    method: Literal["rtn", "mse", "signround"] = "mse",
    calibration: Calibration | None = None,
    check: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Report:
    """Converts a checkpoint; the same call after a kill goes on with the part that was being written.

    Args:
        source: anything that :func:`glm_jax.checkpoint.sources.open.open_source` takes.
        destination: new or empty folder, or that of an earlier run: a stopped conversion goes on, and of a finished
            one what is missing or of the wrong size is written again.
        to: "orbax" (parts that load fast and in slices) or "safetensors" (a Hugging Face folder).
        dtype: of the weights that are not quantised; ``None`` keeps every array's own.
        quantize: a preset (:data:`glm_jax.weights.PRESETS`) or rules; ``None`` keeps every value.
        method: "rtn" rounds to nearest, "mse" searches scales for the least squared error, "signround" also learns
            from text how to round (one layer in memory at a time, about 24 bytes per weight of it).
        calibration: the text for "signround"; the miniature's own data unless given.
        check: refuse weights that are NaN or infinite; compare every byte of a finished conversion with the source, and
            write again what differs.
        force: start over, replacing whatever conversion is in the destination.
        progress: show it on stderr.

    Raises:
        CheckpointError: for bad sources, folders that cannot be written, full disks, and arrays that do not read back.
        ConfigError: for a ``config.json`` that this stack cannot run.
        QuantError: for a quantisation that does not exist.
    """
    folder = _destination(destination)
    weights = source if isinstance(source, WeightSource) else open_source(source, dtype=dtype)
    if weights.info.folder and weights.info.folder.resolve() == folder:
        raise CheckpointError(f"{folder} is the source: choose another destination")
    if rules := QuantRules.named(quantize):
        # What the folder cannot hold quantised is not rounded in vain.
        keep = NOT_LINEAR if to == "safetensors" else ()
        weights = _requantised(weights, rules, method, calibration, dtype or weights.info.dtype, keep)
    elif calibration is not None:
        raise QuantError("a calibration text is for quantising: say to what, with quantize (--quantize)")
    elif method != "mse":
        raise QuantError(f"{method} is a way to quantise: say to what, with quantize (--quantize)")
    target = TARGETS[to](weights, None if dtype is None else DTYPES[dtype])
    bar: Bar = functools.partial(progress_bar, show=progress)
    quantised = f", quantised {quantize if isinstance(quantize, str) else 'by rules'} by {method}" if quantize else ""
    title = f"a conversion of {weights.info.name} to {to}, dtype {dtype or 'unchanged'}{quantised}"
    with open_work(folder, Job(_key(weights, to, dtype), title, weights.modified()), force=force) as work:
        if isinstance(weights, CalibratedSource):
            weights.folder, weights.keep_all = folder, to == "safetensors"
            if progress:
                needed = in_gb(weights.memory_bytes())
                print(f"learning how to round, one layer at a time, takes about {needed} of memory", file=sys.stderr)
        if check:
            # Of a source that is quantised on the way, the values before: codes are always finite.
            given = weights.base if isinstance(weights, Requantised) else weights
            with bar("checking", given.total_bytes()) as advance:
                check_finite(given, advance)
        if work.done:
            _recall(work, target, bar, check=check)
        return _run(work, target, bar, weights)


def _requantised(
    source: WeightSource,
    rules: QuantRules,
    method: str,
    calibration: Calibration | None,
    dtype: str,
    keep: Collection[tuple[str, ...]],
) -> WeightSource:
    if method == "signround":
        text = calibration or Calibration()
        return CalibratedSource(source, rules, text, Settings(steps=text.steps), dtype=dtype, keep=keep)
    if calibration is not None:
        raise QuantError(f"the method {method} uses no calibration text: say signround, or leave the text out")
    if method not in get_args(Method):
        raise QuantError(f"no method {method!r}; there are {', '.join(get_args(Method))}, signround")
    return Requantised(source, rules, cast(Method, method), dtype=dtype, keep=keep)


def _destination(destination: str | Path) -> Path:
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
    notes = (*said, *(source.notes() if isinstance(source, CalibratedSource) else ()))
    return Report(work.folder, _total(target), len(pending), len(target.units) - len(pending), notes)


def _total(target: Target) -> int:
    return sum(unit.nbytes for unit in target.units)


def _write(work: Work, pending: Sequence[Unit], bar: Bar, source: WeightSource) -> None:
    needed = sum(unit.nbytes for unit in pending)
    if isinstance(source, CalibratedSource) and pending:
        source.require_memory()
    with bar("converting", needed) as advance:
        for unit in pending:
            work.require_space(needed + (source.state_bytes() if isinstance(source, CalibratedSource) else 0))
            needed -= unit.nbytes
            meter = _Meter(advance)
            if isinstance(source, CalibratedSource):
                source.advance = functools.partial(meter.early, unit.nbytes)
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
