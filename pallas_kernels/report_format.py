"""What reports have in common: lengths as people write them, tables, files that are never half written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_sizes(text: str) -> tuple[int, ...]:
    """Reads ``1,8k``: positive numbers with commas, k for 1,024 of them.

    Raises:
        ValueError: for anything else.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,8}k?", part) for part in parts):
        raise ValueError(f"positive numbers with commas, as in 1,8 or 1k,32k, not {text!r}")
    return tuple(int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts)


def format_size(number: int) -> str:
    """A length as people write it: 8,192 as ``8k``."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 0) -> str:
    """A Markdown table of numbers, the first columns of which may hold words."""
    rule = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))


def write_report(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text, or an object as JSON, so that whoever stops the program finds a whole file."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    made = path.with_name(f".{path.name}.new")
    made.write_text(text, encoding="utf-8")
    os.replace(made, path)
