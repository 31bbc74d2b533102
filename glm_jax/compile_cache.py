"""Compiled programs: kept in a private folder of the user's, and said on stderr while they are made.

Whoever can write a program into JAX's persistent cache can run code in this process, so a folder that others own, or
can write to or replace, is not used.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax

_MAX_BYTES = 4 << 30  # also turns on JAX's file locks
_NOTICE_AFTER_S = 1.0


def use_compile_cache() -> Path | None:
    """Turns JAX's persistent cache on, unless the program has set one up already.

    Returns:
        The folder in use, or None when there is no folder that is safe to use (said on stderr), or the cache is off.
    """
    config: Any = jax.config  # its options are made at run time
    current = config.jax_compilation_cache_dir
    if current or not config.jax_enable_compilation_cache:
        return Path(current) if current else None
    try:
        folder = _cache_home() / "glm_jax" / "compiled"
        _make_private(folder)
    except OSError as error:
        print(f"compiled programs are not kept: {error.strerror or error}", file=sys.stderr)
        return None
    config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _cache_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says the XDG base directory specification
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _make_private(folder: Path) -> None:
    """Makes the folder, and the one it is in, for this user alone.

    Raises:
        OSError: if that is not possible, or someone else could put a file there.
    """
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
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


_seen: set[Hashable] = set()


@contextlib.contextmanager
def compile_notice(what: str, key: Hashable, spent: Callable[[float], None] | None = None) -> Iterator[None]:
    """Says on stderr that the first call of a shape compiles, if it takes longer than a moment.

    Args:
        what: shown to the user.
        key: identifies the compilation; later calls with it say nothing.
        spent: is told the seconds that a first call took.
    """
    if key in _seen:
        yield
        return
    begun = time.perf_counter()
    slow = threading.Event()

    def announce() -> None:
        slow.set()
        print(f"compiling {what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(_NOTICE_AFTER_S, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
        _seen.add(key)
    finally:
        timer.cancel()
        seconds = time.perf_counter() - begun
        if spent:
            spent(seconds)
        if slow.is_set():
            print(f"compiling {what} took {seconds:.1f} s", file=sys.stderr, flush=True)
