"""The tools of a request: their declarations, and which of them an answer may call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from glm_jax.errors import PromptError

TOOL_NAME_PATTERN: Final = re.compile(r"[^\s<>]{1,256}")
"""Names that the output format can express: in an answer, a name ends at white space or at a tag."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A declared function.

    Attributes:
        name: Name by which an answer calls the function.
        properties: JSON schema of each parameter by name; empty if no parameters are declared.
        declaration: Object as the caller wrote it; the prompt shows it unchanged.
    """

    name: str
    properties: Mapping[str, Any]
    declaration: Mapping[str, Any] = field(repr=False)


def parse_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Parses tools in OpenAI's form, ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    The inner object alone is accepted too, and shown as it is.

    Raises:
        PromptError: if an entry is not a function with a valid name, or two have the same name.
    """
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise PromptError("tools must be a list of function objects")
    functions = tuple(_parse_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool.name for tool in functions]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise PromptError(f"tools: the name {duplicates[0]!r} comes twice; names must differ")
    return functions


def select_callable_tools(tools: tuple[Tool, ...], tool_choice: str | Mapping[str, Any]) -> dict[str, Tool] | None:
    """The tools that an answer may call, by name; None, which allows any name, if no tools are declared.

    Raises:
        PromptError: if ``tool_choice`` is not "auto", "none", "required" or the
            ``{"type": "function", "function": {"name": …}}`` of a declared tool, or requires a call without any tool.
    """
    by_name = {tool.name: tool for tool in tools}
    if tool_choice == "none":
        return {}
    if tool_choice == "auto":
        return by_name or None
    if tool_choice == "required":
        if not tools:
            raise PromptError('tool_choice "required" needs tools')
        return by_name
    name = named_tool_choice(tool_choice)
    if name is None:
        raise PromptError(
            'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": …}}, '
            f"not {str(tool_choice)[:100]!r}"
        )
    if name not in by_name:
        raise PromptError(f"tool_choice names {name!r}, which is not among the tools: {', '.join(by_name) or 'none'}")
    return {name: by_name[name]}


def named_tool_choice(tool_choice: str | Mapping[str, Any]) -> str | None:
    """The function that ``tool_choice`` names; None if it names none."""
    match tool_choice:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    return None


def dump_prompt_json(value: object, where: str) -> str:
    """Serializes a value as the prompt shows it: non-ASCII characters as they are, ", " and ": ", keys in given order.

    Raises:
        PromptError: if JSON cannot express the value; NaN and infinity are such values.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{where} cannot be written as JSON: {error}") from None


def _parse_tool(tool: Mapping[str, Any], where: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise PromptError(f"{where} must be an object, not {type(tool).__name__}")
    if tool.get("type", "function") != "function":
        raise PromptError(f'{where}: only tools of type "function" are supported, not {tool["type"]!r}')
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise PromptError(f'{where} has no function name: give {{"type": "function", "function": {{"name": …}}}}')
    if not TOOL_NAME_PATTERN.fullmatch(name):
        raise PromptError(
            f"{where}: the function name {name!r} must be 1 to 256 characters without white space and angle brackets"
        )
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise PromptError(f"{where}: parameters must be a JSON schema object, not {type(parameters).__name__}")
    properties = (parameters or {}).get("properties")
    return Tool(name, properties if isinstance(properties, Mapping) else {}, tool)
