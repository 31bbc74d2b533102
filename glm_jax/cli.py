"""What the commands share: exit codes, error lines, early environment, memory readings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from glm_jax.errors import GlmError, PromptError

OK, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def finish(run: Callable[[], int]) -> NoReturn:
    """Runs a command and exits: 0 done, 2 bad usage or input, 1 failure, 130 interrupted."""
    try:
        code = run()
        sys.stdout.flush()
    except GlmError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except BrokenPipeError:
        # The reader of our output left; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        code = FAILURE
    sys.exit(code)


def set_memory_fraction(fraction: float) -> None:
    """Lets JAX take this part of a GPU's memory; must run before JAX is imported.

    Raises:
        PromptError: if it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise PromptError(f"--memory-fraction must be in (0, 1], not {fraction}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(fraction))


def read_text(path: str) -> str:
    """A prompt from a file, or from stdin for "-".

    Raises:
        PromptError: if it cannot be read or is not UTF-8.
    """
    name = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start:,}") from None  # type: ignore[possibly-undefined]
    except OSError as error:
        raise PromptError(f"cannot read {name}: {error.strerror}") from None


def peak_memory() -> tuple[int, str]:
    """Bytes at the peak and where: of the first device if it keeps count, else of this process."""
    import resource

    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], device.device_kind
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"
