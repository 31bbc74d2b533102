"""JAX's persistent compilation cache in a private folder of the user's.

Whoever can write a compiled program into that cache can run code in this process, so a folder that others own or can write
to is not used.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import jax

_MAX_BYTES = 4 << 30  # also turns on JAX's file locks


def use_compile_cache() -> Path | None:
    """Turns the cache on, unless the program has set one up already.

    Returns:
        The folder in use, or ``None`` when there is no folder that is safe to use (said on stderr).
    """
    current = jax.config.jax_compilation_cache_dir
    if current or not jax.config.jax_enable_compilation_cache:
        return Path(current) if current else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "glm_jax" / "compiled"
    if problem := _unsafe(folder):
        print(f"compiled programs are not kept: {problem}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _unsafe(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = folder.stat()
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    if hasattr(os, "getuid") and info.st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if stat.S_IMODE(info.st_mode) & 0o022:
        return f"others may write to {folder}; run chmod 700 on it"
    return None
