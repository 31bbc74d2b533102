"""Cache folders for compiled programs, private to the user.

Whoever can write into such a folder can run code in this process.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def private_cache_dir(name: str) -> Path:
    """Returns a cache folder of this project that only the user can write to, and creates it if it is missing.

    Args:
        name: Name of the folder, after its contents.

    Raises:
        OSError: If the folder cannot be created, or another user could write into it.
    """
    folder = _cache_home() / "glm_jax" / name
    _ensure_private(folder)
    return folder


def _cache_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG base directory specification says to ignore a relative one
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _ensure_private(folder: Path) -> None:
    """Creates the folder and its parent for this user alone."""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.parent.mkdir(exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror})") from None
    if not hasattr(os, "getuid"):
        return
    for path in (folder, folder.parent):
        info = path.stat()
        if info.st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"others may write to {path}; run chmod 700 on it")
    for path in folder.resolve().parents:
        # In a sticky folder, such as /tmp, users cannot replace each other's files.
        if path.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise OSError(f"others may write to {path}, in which it would be")
