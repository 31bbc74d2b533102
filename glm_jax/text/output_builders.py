"""Builders for the parts of a streamed answer: text, and tool calls whose JSON is written piece by piece."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from glm_jax.text.output_types import ToolCall
from glm_jax.text.schema_coercion import coerce_to_types, schema_types


class TextBuilder:
    """Text of one part of the answer.

    White space is held back until more text follows, so that trailing white space can be dropped.

    Args:
        strip_start: Whether leading white space is dropped.
    """

    def __init__(self, strip_start: bool) -> None:
        self._strip_start = strip_start
        self._emitted: list[str] = []
        self._pending_space: list[str] = []

    def add(self, text: str) -> str:
        """Appends text and returns the part that can be shown now."""
        body = text.rstrip()
        if not body:
            self._pending_space.append(text)
            return ""
        emitted = "".join([*self._pending_space, body])
        if self._strip_start and not self._emitted:
            emitted = emitted.lstrip()
        self._pending_space = [text[len(body) :]]
        self._emitted.append(emitted)
        return emitted

    def end(self, keep_trailing_space: bool) -> str:
        """Ends the text and returns the trailing white space, if it is kept."""
        keep = keep_trailing_space and not (self._strip_start and not self._emitted)
        space = "".join(self._pending_space) if keep else ""
        self._emitted.append(space)
        self._pending_space = []
        return space

    def result(self) -> str | None:
        """The whole text; None if it is empty."""
        return "".join(self._emitted) or None


class ToolCallBuilder:
    """One tool call. Each method returns the piece of JSON text that it appends.

    A value that can only be a string is written as it arrives. Any other value is written when it is complete, because
    its type depends on the whole text.

    Args:
        index: Number of the call within the answer.
        name: Name of the called function.
        properties: JSON schema of each parameter by name.
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
        """Begins the value of the argument ``key``."""
        self._key, self._value = key, []
        self._types = schema_types(self._properties.get(key))
        prefix = ", " if self._json else "{"
        return self._write(f"{prefix}{_dump(key)}: {_QUOTE if self._is_string() else ''}")

    def add_value(self, text: str) -> str:
        """Appends text to the open value."""
        self._value.append(text)
        return self._write(_dump(text)[1:-1]) if self._is_string() else ""

    def close_value(self) -> str:
        """Ends the open value. A repeated key replaces the earlier value, as it does for a JSON parser."""
        value = coerce_to_types("".join(self._value), self._types)
        self._arguments[self._key] = value
        return self._write(_QUOTE if self._is_string() else _dump(value))

    def close(self) -> str:
        """Ends the call and marks it complete."""
        self.complete = True
        return self._write("}" if self._json else "{}")

    def result(self) -> ToolCall:
        """The call built so far."""
        return ToolCall(self.id, self.name, dict(self._arguments), "".join(self._json), self.complete)

    def _is_string(self) -> bool:
        return self._types == {"string"}

    def _write(self, piece: str) -> str:
        self._json.append(piece)
        return piece


_QUOTE = '"'


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
