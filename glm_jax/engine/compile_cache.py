"""Compiled programs: kept in a private folder of the user's, and said on stderr while they are made.

Whoever can write a program into JAX's persistent cache can run code in this process, so a folder that others own or can
write to, or that lies where anybody may replace it, is not used (:mod:`pallas_kernels._cache_dirs`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels._cache_dirs import private_cache_dir

_MAX_BYTES = 4 << 30  # also turns on JAX's file locks
_NOTICE_AFTER_S = 1.0
# Events of jax.monitoring: a program is looked for among those kept, and is there.
_CACHE_REQUEST_EVENT, _CACHE_HIT_EVENT = (
    "/jax/compilation_cache/compile_requests_use_cache",
    "/jax/compilation_cache/cache_hits",
)


def enable_compile_cache() -> Path | None:
    """Turns JAX's persistent cache on, unless the program has set one up already.

    Returns:
        The folder in use, or None when there is no folder that is safe to use (said on stderr), or the cache is off.
    """
    config: Any = jax.config  # its options are made at run time
    current = config.jax_compilation_cache_dir
    if current or not config.jax_enable_compilation_cache:
        return Path(current) if current else None
    try:
        folder = private_cache_dir("compiled")
    except OSError as error:
        print(f"compiled programs are not kept: {error.strerror or error}", file=sys.stderr)
        return None
    config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    config.update("jax_compilation_cache_dir", str(folder))
    return folder


class _CompileNotice:
    """Says that a program is being made, once that takes longer than a moment; not that a kept one is read."""

    def __init__(self, what: str) -> None:
        self.announced = threading.Event()
        self._what = what
        self._timer: threading.Timer | None = None

    def start_timer(self) -> None:
        self.cancel_timer()
        if self.announced.is_set():
            return
        self._timer = threading.Timer(_NOTICE_AFTER_S, self._announce)
        self._timer.daemon = True
        self._timer.start()

    def cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def on_event(self, event: str, **_: str | int) -> None:
        """What JAX tells of its cache."""
        if event == _CACHE_REQUEST_EVENT:
            self.start_timer()
        elif event == _CACHE_HIT_EVENT:
            self.cancel_timer()

    def _announce(self) -> None:
        self.announced.set()
        print(f"compiling {self._what} ...", file=sys.stderr, flush=True)


_compiled_keys: set[Hashable] = set()


@contextlib.contextmanager
def compile_notice(
    description: str, key: Hashable, on_compiled: Callable[[float], None] | None = None
) -> Iterator[None]:
    """Says on stderr that the first call of a shape compiles, if it does and that takes longer than a moment.

    Args:
        description: shown to the user.
        key: identifies the compilation; later calls with it say nothing.
        on_compiled: is told the seconds that a first call took, whether it compiled or found what an earlier run had kept.
    """
    if key in _compiled_keys:
        yield
        return
    begun = time.perf_counter()
    notice = _CompileNotice(description)
    jax.monitoring.register_event_listener(notice.on_event)
    if not _is_cache_enabled():
        notice.start_timer()  # nothing will be looked up
    try:
        yield
        _compiled_keys.add(key)
    finally:
        notice.cancel_timer()
        jax.monitoring.unregister_event_listener(notice.on_event)
        seconds = time.perf_counter() - begun
        if on_compiled:
            on_compiled(seconds)
        if notice.announced.is_set():
            print(f"compiling {description} took {seconds:.1f} s", file=sys.stderr, flush=True)


def _is_cache_enabled() -> bool:
    config: Any = jax.config
    return bool(config.jax_compilation_cache_dir and config.jax_enable_compilation_cache)
