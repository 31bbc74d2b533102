"""Text to calibrate on, as windows of tokens."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.safetensors.header import printable
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.text import read_template, render_chat
from glm_jax.text.tokenizer import load_tokenizer

# Modules of Python's library that the miniature was trained on; none is among its held-out files.
_LIBRARY = """argparse.py ast.py calendar.py configparser.py csv.py difflib.py fractions.py functools.py heapq.py
    inspect.py ipaddress.py logging/__init__.py random.py shutil.py statistics.py subprocess.py tarfile.py textwrap.py
    threading.py typing.py unittest/mock.py urllib/request.py""".split()
_LEAST_WINDOWS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What to calibrate on.

    Attributes:
        path: a text file, or ``.jsonl`` with ``{"text": …}`` or ``{"messages": […], "tools": […]}`` on each line; None
            for the miniature's own data: conversations, and modules of Python's library.
        windows: of text, at most.
        length: tokens in each.
        steps: of the descent, for each layer.
    """

    path: Path | None = None
    windows: int = 256
    length: int = 256
    steps: int = 200

    def tokens(self, cfg: Config, folder: Path | None) -> np.ndarray:
        """Windows int32 ``[N, T]``, spread evenly over the text.

        Raises:
            CheckpointError: if the file cannot be read, or holds too little text.
        """
        tokenizer = load_tokenizer(cfg, folder)
        template = None if folder is None else read_template(folder)
        texts = list(_own() if self.path is None else _in_file(self.path, template))
        ids = [token for text in texts for token in tokenizer.encode(text)]
        count = len(ids) // self.length
        if count < _LEAST_WINDOWS:
            raise CheckpointError(
                f"{'the calibration text' if self.path is None else self.path} has {len(ids):,} tokens: calibrating "
                f"takes at least {_LEAST_WINDOWS * self.length:,}, and does better with {self.windows * self.length:,}"
            )
        whole = np.asarray(ids[: count * self.length], np.int32).reshape(count, self.length)
        chosen = np.linspace(0, count - 1, min(count, self.windows)).astype(int)
        return whole[np.unique(chosen)]


def _own() -> Iterator[str]:
    # Drawn by the miniature's recipe (examples/tiny_recipe/conversations.py), as its training data was.
    yield from _in_file(Path(__file__).parent / "conversations.jsonl", None)
    library = Path(sysconfig.get_path("stdlib"))
    for name in _LIBRARY:
        if (library / name).is_file():
            yield (library / name).read_text(encoding="utf-8")


def _in_file(path: Path, template: str | None) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    if path.suffix != ".jsonl":
        yield text
        return
    # JSON may hold line separators of its own, which splitlines would take for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _of_line(line, f"{path}, line {number}", template)


def _of_line(line: str, where: str, template: str | None) -> str:
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
