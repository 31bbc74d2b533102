"""Formats byte counts and quantities for messages and tables."""

from __future__ import annotations


def pluralize(count: int, noun: str) -> str:
    """Returns a count with its noun: ``1 token``, ``2 tokens``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_bytes(num_bytes: int) -> str:
    """Returns bytes as GB of 10^9 bytes, or as MB below 0.1 GB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
