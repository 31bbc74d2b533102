"""Turns the system's errors about a destination folder into one-sentence messages."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from glm_jax.errors import CheckpointError, GlmError

_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ACCESS_DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def wrap_open_errors(folder: Path) -> Iterator[None]:
    """Converts an ``OSError`` from creating a destination into a ``CheckpointError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (*_DISK_FULL_ERRNOS, *_ACCESS_DENIED_ERRNOS):
            raise _write_error(folder, error.errno, str(error), "run the same command again") from None
        # Repeating the command would not help, so the message suggests another folder.
        reason = error.strerror or str(error)
        raise CheckpointError(f"{folder} cannot be made a folder ({reason}): choose another destination") from None


@contextlib.contextmanager
def wrap_write_errors(folder: Path, *, force: bool = False) -> Iterator[None]:
    """Converts errors from writing to a destination into a ``CheckpointError``.

    TensorStore raises ``ValueError`` with the system's message as text; those errors are recognized by that text.

    Args:
        folder: The destination.
        force: Whether the command ran with ``--force``, which would start over if it were repeated.
    """
    retry = f"run the same command again{' without --force' if force else ''} to continue"
    try:
        yield
    except OSError as error:
        raise _write_error(folder, error.errno, str(error), retry) from None
    except ValueError as error:
        code = _errno_in_text(str(error))
        if code is None or isinstance(error, GlmError):
            raise
        raise _write_error(folder, code, str(error), retry) from None


def _errno_in_text(text: str) -> int | None:
    codes = (*_DISK_FULL_ERRNOS, *_ACCESS_DENIED_ERRNOS, errno.EIO)
    return next((code for code in codes if os.strerror(code) in text), None)


def _write_error(folder: Path, code: int | None, text: str, retry: str) -> CheckpointError:
    if code in _DISK_FULL_ERRNOS:
        return CheckpointError(f"the disk of {folder} is full: make room and {retry}")
    if code in _ACCESS_DENIED_ERRNOS:
        return CheckpointError(f"cannot write to {folder} ({text}): choose a folder that you may write to")
    return CheckpointError(f"writing to {folder} failed ({text}): {retry}")
