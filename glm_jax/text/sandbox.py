"""Renders a checkpoint's own Jinja template, which is somebody else's code, in a child process within limits.

The child (:mod:`glm_jax.text.sandbox_child`) has Jinja's immutable sandbox, a limit on memory and one on output; this
side has the clock. One child renders one prompt, about a tenth of a second.
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


def render_template(template: str, variables: Mapping[str, Any], switches: Mapping[str, Any]) -> str:
    """Renders ``template`` with ``variables`` and ``switches``.

    Args:
        template: Jinja text.
        variables: what every chat template is given; JSON.
        switches: what this caller adds; each must be a variable that the template reads.

    Raises:
        PromptError: in one sentence, if the template fails, does what the sandbox forbids, takes longer than 2 s, or
            needs more than 1 MB of output or 512 MB of memory.
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
    answer = _run_child(payload)
    if "text" in answer:
        return answer["text"]
    raise PromptError(f"the checkpoint's chat template {answer['error']}")


def _run_child(payload: bytes) -> dict[str, str]:
    try:
        # A session of its own, so that Ctrl-C reaches only us; we end it below.
        child = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD_SCRIPT), *_library_folders()],
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
    """Waits until the child has imported Jinja, then starts the clock: a busy machine is not the template's fault."""
    assert child.stdout is not None
    alarm = threading.Timer(_START_TIMEOUT_S, child.kill)
    alarm.start()
    try:
        started = child.stdout.readline()
    finally:
        alarm.cancel()
    if started != b"ready\n":
        raise PromptError("the process that renders chat templates did not start: is the jinja2 package installed?")
    try:
        answer, _ = child.communicate(payload, timeout=RENDER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"takes longer than {RENDER_TIMEOUT_S:g} s and was stopped"}
    try:
        return json.loads(answer)
    except ValueError:
        return {"error": f"was stopped by the system (exit status {child.returncode}): too much memory, or a crash"}


def _library_folders() -> list[str]:
    """Where Jinja is found from here; an isolated interpreter does not know of PYTHONPATH."""
    specs = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    return [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
