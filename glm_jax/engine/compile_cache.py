"""Persistent cache of compiled programs in a private folder, and notices about slow compilations.

Whoever can write a program into JAX's persistent cache can run code in this process. So a folder is refused if another
user owns it, can write to it, or could replace it (:mod:`pallas_kernels._cache_dirs`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels._cache_dirs import private_cache_dir

_MAX_BYTES = 4 << 30  # a limit also turns on JAX's file locks
_MIN_COMPILE_SECONDS = 0.3  # programs that compile faster are not stored
_NOTICE_AFTER_S = 1.0
# Events of jax.monitoring: a program is looked up in the persistent cache, and is found there.
_CACHE_REQUEST_EVENT = "/jax/compilation_cache/compile_requests_use_cache"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_LOGGER = logging.getLogger(__name__)


def enable_compile_cache() -> Path | None:
    """Turns on JAX's persistent cache, unless the program has configured one already.

    Returns:
        The folder in use, or None when the cache is off or no safe folder exists; the latter is logged as a warning.
    """
    config: Any = jax.config  # jax defines its options at run time
    current = config.jax_compilation_cache_dir
    if current or not config.jax_enable_compilation_cache:
        return Path(current) if current else None
    try:
        folder = private_cache_dir("compiled")
    except OSError as error:
        _LOGGER.warning("compiled programs are not kept: %s", error.strerror or error)
        return None
    config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    config.update("jax_compilation_cache_dir", str(folder))
    return folder


class _CompileNotice:
    """Logs that a program compiles, once that has taken a moment; reading a cached program logs nothing.

    Start and end are warnings, like those of ``jax_log_compiles``: without a configured handler Python shows nothing
    below that level, and a silent minute looks like a hang.
    """

    def __init__(self, description: str) -> None:
        self.announced = threading.Event()
        self._description = description
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
        """Listener for :mod:`jax.monitoring`."""
        if event == _CACHE_REQUEST_EVENT:
            self.start_timer()
        elif event == _CACHE_HIT_EVENT:
            self.cancel_timer()

    def _announce(self) -> None:
        self.announced.set()
        _LOGGER.warning("compiling %s ...", self._description)


_compiled_keys: set[Hashable] = set()


@contextlib.contextmanager
def compile_notice(
    description: str, key: Hashable, on_compiled: Callable[[float], None] | None = None
) -> Iterator[None]:
    """Context of a call that compiles the first time; logs the compilation if it takes longer than a moment.

    Args:
        description: Name of the program in the notice.
        key: Identity of the compilation; later calls with an equal key log and measure nothing.
        on_compiled: Receives the seconds of the first call, whether it compiled or read a cached program.
    """
    if key in _compiled_keys:
        yield
        return
    start = time.perf_counter()
    notice = _CompileNotice(description)
    jax.monitoring.register_event_listener(notice.on_event)
    if not _is_cache_enabled():
        notice.start_timer()  # without a cache JAX looks nothing up, so no event will start the timer
    try:
        yield
        _compiled_keys.add(key)
    finally:
        notice.cancel_timer()
        jax.monitoring.unregister_event_listener(notice.on_event)
        seconds = time.perf_counter() - start
        if on_compiled:
            on_compiled(seconds)
        if notice.announced.is_set():
            _LOGGER.warning("compiling %s took %.1f s", description, seconds)


def _is_cache_enabled() -> bool:
    config: Any = jax.config
    return bool(config.jax_compilation_cache_dir and config.jax_enable_compilation_cache)
