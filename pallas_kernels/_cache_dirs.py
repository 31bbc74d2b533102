"""Folders for compiled programs: the user's own, where nobody else can put a file.

Whoever can write into them can run code in this process.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def private_cache_dir(name: str) -> Path:
    """A folder of the user's for this project, made if it is not there.

    Args:
        name: of what is kept in it.

    Raises:
        OSError: if there can be none, or someone else could put a file there.
    """
    folder = _cache_home() / "glm_jax" / name
    _ensure_private(folder)
    return folder


def _cache_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says the XDG base directory specification
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _ensure_private(folder: Path) -> None:
    """Makes the folder, and the one it is in, for this user alone."""
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
        # In a sticky folder, such as /tmp, each user's own stay theirs.
        if path.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise OSError(f"others may write to {path}, in which it would be")
