"""Argument values: the text that a model wrote, typed by the tool's JSON schema.

GLM writes every value as plain text between tags, so the schema alone says what ``5`` is. The rules are those of vLLM's
``coerce_to_schema_type``: of the types that a schema allows, the first that fits in the order of :data:`_COERCERS`;
where none fits, JSON; where that fails, the text itself. Only the top level is typed, and ``$ref`` and ``const`` say
nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

_INTEGER: Final = re.compile(r"\s*[+-]?[0-9]{1,4000}\s*")
_NUMBER: Final = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_MAX_EXACT_INTEGER: Final = 2**53
_STRING: Final = frozenset({"string"})


def schema_types(schema: object) -> frozenset[str]:
    """Types that a property's schema allows; ``{"string"}`` where it says nothing about types."""
    types: set[str] = set()
    todo, seen = [schema], set()
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        own = set(_own_types(part))
        choices = _choices(part)
        types |= own if own or choices else _STRING
        todo += choices
    return frozenset(types)


def coerce_to_types(text: str, types: frozenset[str]) -> Any:
    """The value that ``text`` stands for where a schema allows ``types``."""
    for name, read in _COERCERS.items():
        if name in types:
            try:
                return read(text)
            except (ValueError, RecursionError):
                continue
    try:
        return _json(text)
    except (ValueError, RecursionError):
        return text


def _own_types(schema: object) -> Iterator[str]:
    """Types that ``type`` and ``enum`` name."""
    if not isinstance(schema, Mapping):
        return
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared]:
        if isinstance(name, str):
            yield name.strip().lower()
    for value in _list(schema, "enum"):
        yield _type_of(value)


def _choices(schema: object) -> list[Any]:
    if not isinstance(schema, Mapping):
        return []
    return [choice for key in ("anyOf", "oneOf", "allOf") for choice in _list(schema, key)]


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _null(text: str) -> None:
    if text.lower() != "null":
        raise ValueError(text)


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float | int:
    if not _NUMBER.fullmatch(text) or not math.isfinite(value := float(text)):
        raise ValueError(text)
    # Up to 2**53 a float holds an integer exactly, and beyond it a float is what was meant.
    return int(value) if value.is_integer() and abs(value) <= _MAX_EXACT_INTEGER else value


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    word = text.strip().lower()
    if word not in known:
        raise ValueError(text)
    return known[word]


def _json(text: str, kind: type = object) -> Any:
    """JSON of one kind; refuses NaN, infinities and lone surrogates, which could not be written as JSON again."""
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError(text)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


_COERCERS: Final[dict[str, Callable[[str], Any]]] = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": lambda text: _json(text, dict),
    "array": lambda text: _json(text, list),
    "string": str,
}
