"""Reads calibration text as windows of tokens."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.messages import printable
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.text import read_template, render_chat
from glm_jax.text.tokenizer import load_tokenizer

# Modules of Python's standard library in the miniature's training data; none is among its held-out files.
_STDLIB_FILES = """argparse.py ast.py calendar.py configparser.py csv.py difflib.py fractions.py functools.py heapq.py
    inspect.py ipaddress.py logging/__init__.py random.py shutil.py statistics.py subprocess.py tarfile.py textwrap.py
    threading.py typing.py unittest/mock.py urllib/request.py""".split()
_MIN_WINDOWS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """The text to calibrate on, and the length of the calibration.

    Attributes:
        path: A text file, or a ``.jsonl`` file with ``{"text": …}`` or ``{"messages": […], "tools": […]}`` on each
            line; ``None`` for the miniature's own data: conversations, and modules of Python's standard library.
        max_windows: Maximum number of windows of text.
        window_tokens: Number of tokens per window.
        steps: Number of gradient descent steps per layer.
    """

    path: Path | None = None
    max_windows: int = 256
    window_tokens: int = 256
    steps: int = 200

    def load_windows(self, cfg: Config, folder: Path | None) -> np.ndarray:
        """Returns windows of token ids, int32 ``[N, T]``, spread evenly over the text.

        Args:
            cfg: Config of the model.
            folder: Folder with tokenizer and chat template; ``None`` for the miniature's.

        Raises:
            CheckpointError: if the file cannot be read, or holds too little text.
        """
        tokenizer = load_tokenizer(cfg, folder)
        template = None if folder is None else read_template(folder)
        texts = list(_builtin_texts() if self.path is None else _read_texts(self.path, template))
        ids = [token for text in texts for token in tokenizer.encode(text)]
        count = len(ids) // self.window_tokens
        if count < _MIN_WINDOWS:
            raise CheckpointError(
                f"{'the calibration text' if self.path is None else self.path} has {len(ids):,} tokens: calibrating "
                f"takes at least {_MIN_WINDOWS * self.window_tokens:,}, and does better with "
                f"{self.max_windows * self.window_tokens:,}"
            )
        windows = np.asarray(ids[: count * self.window_tokens], np.int32).reshape(count, self.window_tokens)
        indices = np.linspace(0, count - 1, min(count, self.max_windows)).astype(int)
        return windows[np.unique(indices)]


def _builtin_texts() -> Iterator[str]:
    # Generated like the miniature's training data (examples/tiny_recipe/conversations.py).
    yield from _read_texts(Path(__file__).parent / "conversations.jsonl", None)
    library = Path(sysconfig.get_path("stdlib"))
    for name in _STDLIB_FILES:
        if (library / name).is_file():
            yield (library / name).read_text(encoding="utf-8")


def _read_texts(path: Path, template: str | None) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    if path.suffix != ".jsonl":
        yield text
        return
    # splitlines would also split at the Unicode line separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_line(line, f"{path}, line {number}", template)


def _parse_line(line: str, where: str, template: str | None) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({printable(str(error))})") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return render_chat(
            record["messages"], record.get("tools") or None, template=template, add_generation_prompt=False
        )
    raise CheckpointError(f'{where} must be an object with "text" or "messages"')
