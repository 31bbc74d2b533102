"""Progress of long operations: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich import console, progress

ProgressCallback = Callable[[int], None]

_LINE_SECONDS = 5.0
_BYTES = "bytes"


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, *, unit: str = _BYTES, show: bool = True, stream: TextIO | None = None
) -> Iterator[ProgressCallback]:
    """Shows progress and the remaining time while the block runs; yields a function that adds finished units.

    Args:
        label: Name of the operation.
        total: Number of units in all.
        unit: Name of the unit in the plural; bytes are shown in GB and MB/s.
        show: Whether to show anything.
        stream: Stream to write to; stderr if ``None``.
    """
    if not show:
        yield lambda _: None
        return
    out = sys.stderr if stream is None else stream
    if out.isatty():
        with _bar(label, total, unit, out) as advance:
            yield advance
    else:
        yield _LineProgress(label, total, unit, out).advance


@contextlib.contextmanager
def _bar(label: str, total: int, unit: str, stream: TextIO) -> Iterator[ProgressCallback]:
    counted = (progress.MofNCompleteColumn(), progress.TextColumn(unit))
    done = (progress.DownloadColumn(), progress.TransferSpeedColumn()) if unit == _BYTES else counted
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *done, progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console.Console(file=stream)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


class _LineProgress:
    """Prints a line every few seconds and one at the end."""

    def __init__(self, label: str, total: int, unit: str, stream: TextIO) -> None:
        self._label, self._total, self._unit, self._stream = label, total, unit, stream
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def advance(self, count: int) -> None:
        """Adds finished units, and prints a line if one is due."""
        self._done += count
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-3)
        seconds_left = (self._total - self._done) / max(rate, 1e-3)
        if self._unit == _BYTES:
            amount = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
        else:
            amount = f"{self._done:,} of {self._total:,} {self._unit}"
        print(f"{self._label}: {amount}, {seconds_left:.0f} s left", file=self._stream, flush=True)
