"""Renders a checkpoint's own Jinja chat template, which is untrusted code, in a child process.

The child (:mod:`glm_jax.text.sandbox_child`) uses Jinja's immutable sandbox and limits memory and output; the parent
enforces the timeout. Each prompt gets its own child, which takes about a tenth of a second.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from glm_jax.errors import PromptError

RENDER_TIMEOUT_S: Final = 2.0
MAX_OUTPUT_BYTES: Final = 1 << 20
MAX_MEMORY_BYTES: Final = 512 << 20
_START_TIMEOUT_S: Final = 30.0
_CHILD_SCRIPT: Final = Path(__file__).with_name("sandbox_child.py")
# An isolated interpreter (-I) ignores PYTHONPATH, so the folders that hold Jinja are passed as arguments.
_CHILD_BOOTSTRAP: Final = (
    "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
)


def render_template(template: str, variables: Mapping[str, Any], switches: Mapping[str, Any]) -> str:
    """Renders ``template`` with ``variables`` and ``switches``.

    Args:
        template: Jinja text.
        variables: Variables that every chat template gets; values that JSON can express.
        switches: Additional variables of this call; the template must read each of them.

    Raises:
        PromptError: if the template fails, does what the sandbox forbids, takes longer than 2 s, or needs more than
            1 MB of output or 512 MB of memory. The message is one sentence.
    """
    job = {
        "template": template,
        "variables": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **variables},
        "switches": switches,
        "output_bytes": MAX_OUTPUT_BYTES,
        "memory_bytes": MAX_MEMORY_BYTES,
        "cpu_seconds": int(RENDER_TIMEOUT_S) + 1,
    }
    try:
        payload = json.dumps(job).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"the conversation cannot be given to the chat template as JSON: {error}") from None
    result = _run_child(payload)
    if "text" in result:
        return result["text"]
    raise PromptError(f"the checkpoint's chat template {result['error']}")


def _run_child(payload: bytes) -> dict[str, str]:
    try:
        # In a new session Ctrl-C does not reach the child; it is killed below.
        child = subprocess.Popen(
            _child_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        raise PromptError(f"cannot start {sys.executable!r} to render the chat template: {error}") from error
    with child:
        try:
            return _exchange(child, payload)
        finally:
            child.kill()


def _exchange(child: subprocess.Popen[bytes], payload: bytes) -> dict[str, str]:
    """Sends the job; the timeout starts only when the child has imported Jinja, which a busy machine delays."""
    assert child.stdout is not None
    watchdog = threading.Timer(_START_TIMEOUT_S, child.kill)
    watchdog.start()
    try:
        first_line = child.stdout.readline()
    finally:
        watchdog.cancel()
    if first_line != b"ready\n":
        raise PromptError("the process that renders chat templates did not start: is the jinja2 package installed?")
    try:
        output, _ = child.communicate(payload, timeout=RENDER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"takes longer than {RENDER_TIMEOUT_S:g} s and was stopped"}
    try:
        return json.loads(output)
    except ValueError:
        return {"error": f"was stopped by the system (exit status {child.returncode}): too much memory, or a crash"}


def _child_command() -> list[str]:
    specs = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
    return [sys.executable, "-I", "-c", _CHILD_BOOTSTRAP, str(_CHILD_SCRIPT), *folders]
