"""The growing parts of an answer: text whose white space waits, and a call whose JSON is written as it comes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from glm_jax.text.output_types import ToolCall
from glm_jax.text.schema_coercion import coerce_to_types, schema_types


class TextBuilder:
    """Text that holds white space back until something follows it, so that a trailing run can still be dropped."""

    def __init__(self, strip_start: bool) -> None:
        self._strip_start = strip_start
        self._shown: list[str] = []
        self._held: list[str] = []

    def add(self, text: str) -> str:
        """Takes text and returns what can be shown now."""
        body = text.rstrip()
        if not body:
            self._held.append(text)
            return ""
        shown = "".join([*self._held, body])
        if self._strip_start and not self._shown:
            shown = shown.lstrip()
        self._held = [text[len(body) :]]
        self._shown.append(shown)
        return shown

    def end(self, keep_held: bool) -> str:
        """Ends the text; returns the white space that stays."""
        keep = keep_held and not (self._strip_start and not self._shown)
        rest = "".join(self._held) if keep else ""
        self._shown.append(rest)
        self._held = []
        return rest

    def result(self) -> str | None:
        """All that was shown; None for nothing."""
        return "".join(self._shown) or None


class ToolCallBuilder:
    """One tool call. Each method returns the piece of JSON that it adds.

    A value whose type can only be a string is written while it comes; any other when it is whole.
    """

    def __init__(self, index: int, name: str, properties: Mapping[str, Any]) -> None:
        self.index = index
        self.id = f"call_{secrets.token_hex(12)}"
        self.name = name
        self.complete = False
        self._properties = properties
        self._arguments: dict[str, Any] = {}
        self._json: list[str] = []
        self._key = ""
        self._types: frozenset[str] = frozenset()
        self._value: list[str] = []

    def open_value(self, key: str) -> str:
        """Begins the value of ``key``."""
        self._key, self._value = key, []
        self._types = schema_types(self._properties.get(key))
        before = ", " if self._json else "{"
        return self._write(f"{before}{_dump(key)}: {_QUOTE if self._is_string() else ''}")

    def add_value(self, text: str) -> str:
        """Adds text to the value."""
        self._value.append(text)
        return self._write(_dump(text)[1:-1]) if self._is_string() else ""

    def close_value(self) -> str:
        """Ends the value. A key that came before is replaced, as it is for a reader of the JSON."""
        value = coerce_to_types("".join(self._value), self._types)
        self._arguments[self._key] = value
        return self._write(_QUOTE if self._is_string() else _dump(value))

    def close(self) -> str:
        """Ends a well-formed call."""
        self.complete = True
        return self._write("}" if self._json else "{}")

    def result(self) -> ToolCall:
        """The call as it stands."""
        return ToolCall(self.id, self.name, dict(self._arguments), "".join(self._json), self.complete)

    def _is_string(self) -> bool:
        return self._types == {"string"}

    def _write(self, piece: str) -> str:
        self._json.append(piece)
        return piece


_QUOTE = '"'


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
