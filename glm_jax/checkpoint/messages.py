"""Text for error messages: names from files made safe to print, and long lists cut short."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str, limit: int = 120) -> str:
    """Makes text from a file safe to print: no control characters, no lone surrogates, at most ``limit`` characters."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_names(names: Sequence[str], limit: int = 20) -> str:
    """Joins names with commas: the first ``limit`` of them, and how many more there are."""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
