"""Shared parts of the commands: exit codes, error lines, log messages, early environment, options."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from glm_jax.errors import GlmError, PromptError

OK, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_LOGGED_PACKAGES = ("glm_jax", "convert")
_MEMORY_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def run_and_exit(command: Callable[[], int]) -> NoReturn:
    """Runs a command and exits: 0 done, 2 bad usage or input, 1 failure, 130 interrupted."""
    _open_missing_streams()
    _silence_cuda_check()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a character that the terminal lacks must not end the command
    try:
        with log_to_stderr():
            code = command()
        sys.stdout.flush()
    except GlmError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except BrokenPipeError:
        # The reader of the output has left; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        code = FAILURE
    sys.exit(code)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes messages as they are to whatever ``sys.stderr`` is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]  (read only)
        """The current ``sys.stderr``."""
        return sys.stderr


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Shows the project's log messages, from level INFO on, as plain lines on stderr.

    The library configures no handler. In a notebook Python itself shows warnings in the same way, unless logging is
    configured.
    """
    loggers = [logging.getLogger(package) for package in _LOGGED_PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    handler = _StderrHandler()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a handler of the root logger would repeat each message
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _open_missing_streams() -> None:
    """Opens the null device in place of streams that the parent process closed (``<&-``), which are None in Python."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (stays open to the end)


def _silence_cuda_check() -> None:
    """Keeps JAX's CUDA plugin, which ``plan --compile`` uses, from warning at each start that there is no CUDA."""
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg")):  # Linux, and Linux within Windows
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def set_memory_fraction(fraction: float) -> None:
    """Sets the part of a GPU's memory that JAX takes, unless the environment sets it already.

    Must run before JAX is imported. XLA has two names for this setting, and does not start when both are set.

    Raises:
        PromptError: if ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise PromptError(f"--memory-fraction must be in (0, 1], not {fraction}")
    if not any(os.environ.get(name) for name in _MEMORY_FRACTION_VARIABLES):
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(fraction)


def read_prompt_text(path: str) -> str:
    """Text of a prompt in a file, or on stdin for "-".

    Raises:
        PromptError: if the text cannot be read or is not UTF-8.
    """
    name = "stdin" if path == "-" else path or "''"
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(os.path.expanduser(path)).read_bytes()
    except (OSError, ValueError) as error:
        raise PromptError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at offset {error.start:,}"
        raise PromptError(f"{name} is not UTF-8 ({byte}): convert it first, with iconv for example") from None
