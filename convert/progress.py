"""Progress of long copies, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

Advance = Callable[[int], None]

_LINE_SECONDS = 5.0


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, show: bool = True, stream: TextIO | None = None) -> Iterator[Advance]:
    """Shows bytes done, MB/s and time left while the block runs; yields a function that takes bytes just done.

    Args:
        label: what is going on.
        total: bytes in all.
        show: whether to show anything at all.
        stream: stderr unless given.
    """
    if not show:
        yield lambda _: None
        return
    out = sys.stderr if stream is None else stream
    if out.isatty():
        with _bar(label, total, out) as advance:
            yield advance
    else:
        yield _Lines(label, total, out).advance


@contextlib.contextmanager
def _bar(label: str, total: int, stream: TextIO) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """A line every few seconds and one at the end."""

    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        self._label, self._total, self._stream = label, total, stream
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def advance(self, count: int) -> None:
        """Counts bytes, and prints a line if it is time."""
        self._done += count
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-3)
        left = (self._total - self._done) / max(rate, 1.0)
        amount = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        print(f"{self._label}: {amount}, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=self._stream, flush=True)
