"""Converts the text of a tool argument to the type that the tool's JSON schema declares.

GLM writes every value as plain text between tags, so only the schema tells whether ``5`` is a number or a string. The
rules are those of vLLM's ``coerce_to_schema_type``: the allowed types are tried in the order of :data:`_COERCERS`, then
JSON, and otherwise the value is the text itself. Only the top level of a schema is read; ``$ref`` and ``const`` are
ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

_INTEGER: Final = re.compile(r"\s*[+-]?[0-9]{1,4000}\s*")
_NUMBER: Final = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_MAX_EXACT_INTEGER: Final = 2**53
_STRING: Final = frozenset({"string"})


def schema_types(schema: object) -> frozenset[str]:
    """The types that a property's schema allows; ``{"string"}`` if it does not mention types."""
    types: set[str] = set()
    pending, seen = [schema], set()
    while pending:
        subschema = pending.pop()
        if id(subschema) in seen:
            continue
        seen.add(id(subschema))
        own = set(_own_types(subschema))
        alternatives = _alternatives(subschema)
        types |= own if own or alternatives else _STRING
        pending += alternatives
    return frozenset(types)


def coerce_to_types(text: str, types: frozenset[str]) -> JsonValue:
    """Converts ``text`` to the first of ``types`` that fits, else reads it as JSON, else returns the text."""
    for name, coerce in _COERCERS.items():
        if name in types:
            try:
                return coerce(text)
            except (ValueError, RecursionError):
                continue
    try:
        return _json(text)
    except (ValueError, RecursionError):
        return text


def _own_types(schema: object) -> Iterator[str]:
    """The types that ``type`` and the values of ``enum`` name."""
    if not isinstance(schema, Mapping):
        return
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared]:
        if isinstance(name, str):
            yield name.strip().lower()
    for value in _list(schema, "enum"):
        yield _type_of(value)


def _alternatives(schema: object) -> list[Any]:
    if not isinstance(schema, Mapping):
        return []
    return [alternative for key in ("anyOf", "oneOf", "allOf") for alternative in _list(schema, key)]


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
    # A float holds integers up to 2**53 exactly; a larger number was meant as a float.
    return int(value) if value.is_integer() and abs(value) <= _MAX_EXACT_INTEGER else value


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    word = text.strip().lower()
    if word not in values:
        raise ValueError(text)
    return values[word]


def _json(text: str, kind: type = object) -> JsonValue:
    """Parses JSON of one Python type; rejects NaN, infinities and lone surrogates, which JSON cannot express."""
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError(text)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


_COERCERS: Final[dict[str, Callable[[str], JsonValue]]] = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": lambda text: _json(text, dict),
    "array": lambda text: _json(text, list),
    "string": str,
}
