"""The tools of a request: what a caller declares, and which of them an answer may call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from glm_jax.errors import PromptError

TOOL_NAME_PATTERN: Final = re.compile(r"[^\s<>]{1,256}")
"""What an answer can call: the name ends at white space or a tag."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One declared function.

    Attributes:
        name: what an answer calls it by.
        properties: JSON schema of each parameter by name; empty where none is declared.
        declaration: the whole object as the caller wrote it, which is what the prompt shows.
    """

    name: str
    properties: Mapping[str, Any]
    declaration: Mapping[str, Any] = field(repr=False)


def parse_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Reads tools in OpenAI's form, ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    The inner object alone is accepted as well, and shown as given.

    Raises:
        PromptError: if an entry is not a function with a name, a name comes twice, or one is not JSON.
    """
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise PromptError("tools must be a list of function objects")
    read = tuple(_parse_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool.name for tool in read]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PromptError(f"tools: the name {twice[0]!r} comes twice; names must differ")
    return read


def select_callable_tools(tools: tuple[Tool, ...], tool_choice: str | Mapping[str, Any]) -> dict[str, Tool] | None:
    """The tools that an answer may call, by name; None where no tools were declared, so that any name will do.

    Raises:
        PromptError: if ``tool_choice`` is not "auto", "none", "required" or a declared function's
            ``{"type": "function", "function": {"name": …}}``, or demands a call where there are no tools.
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
    """The function that ``tool_choice`` names, or None."""
    match tool_choice:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    return None


def dump_prompt_json(value: object, where: str) -> str:
    """JSON as the prompt shows it: characters as they are, ", " and ": " between parts, keys in the order given.

    Raises:
        PromptError: if the value cannot be JSON, as NaN and infinity cannot.
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
