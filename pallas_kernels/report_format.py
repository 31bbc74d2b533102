"""Formats that reports share: sizes, Markdown tables, and files that are never half written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parses positive numbers separated by commas, with k for 1,024: ``1,8k``.

    Raises:
        ValueError: For any other text.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,8}k?", part) for part in parts):
        raise ValueError(f"positive numbers with commas, as in 1,8 or 1k,32k, not {text!r}")
    return tuple(int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts)


def format_size(number: int) -> str:
    """Formats a size: 8,192 as ``8k``."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 0) -> str:
    """Returns a Markdown table whose first ``text_columns`` columns are text and whose others are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))


def write_report(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text, or an object as JSON, in one step, so that an interrupted program leaves a complete file."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
