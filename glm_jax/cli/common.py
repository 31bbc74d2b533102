"""What the commands share: exit codes, error lines, early environment, options, memory readings."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from glm_jax.errors import GlmError, PromptError

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec

OK, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_MEMORY_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def run_and_exit(command: Callable[[], int]) -> NoReturn:
    """Runs a command and exits: 0 done, 2 bad usage or input, 1 failure, 130 interrupted."""
    _open_missing_streams()
    _silence_cuda_check()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character the terminal lacks must not end the command
    try:
        code = command()
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


def _open_missing_streams() -> None:
    """A stream that whoever started us closed (``<&-``) is None in Python; it becomes an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (open to the end)


def _silence_cuda_check() -> None:
    """JAX's plugin for CUDA, which ``plan --compile`` uses, must not complain at every start that there is no CUDA."""
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg")):  # Linux, and Linux within Windows
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def optional_text(metavar: str) -> PrimitiveConstructorSpec[str | None]:
    """How an optional text is read from the command line: as it is, where tyro would take "None" for no text."""
    from tyro.constructors import PrimitiveConstructorSpec

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [] if value is None else [value],
    )


def set_memory_fraction(fraction: float) -> None:
    """Lets JAX take this part of a GPU's memory; must run before JAX is imported. The environment's own setting wins.

    XLA has two names for that setting, and refuses to start when it finds both.

    Raises:
        PromptError: if it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise PromptError(f"--memory-fraction must be in (0, 1], not {fraction}")
    if not any(os.environ.get(name) for name in _MEMORY_FRACTION_VARIABLES):
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(fraction)


def read_prompt_text(path: str) -> str:
    """A prompt from a file, or from stdin for "-".

    Raises:
        PromptError: if it cannot be read or is not UTF-8.
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


def peak_memory() -> tuple[int, str]:
    """Bytes at the peak and where: of the first device if it keeps count, else of this process."""
    import resource

    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], device.device_kind
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process"
