"""Atomic writes: a file appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_atomic(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Opens ``temporary`` for writing and renames it to ``path`` once the block has ended without an error.

    The bytes reach the disk before the rename, so that not even a power failure leaves half a file at ``path``.

    Args:
        path: Final name of the file.
        temporary: Name of the file while it is written, in the same folder. A killed process leaves it behind.
    """
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file atomically; text is encoded as UTF-8."""
    with open_atomic(path, path.with_name(f".{path.name}.tmp")) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_if_changed(path: Path, content: str | bytes) -> None:
    """Writes a file atomically unless it already has exactly this content."""
    data = content.encode() if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)
