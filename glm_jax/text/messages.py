"""Checks a conversation and normalizes it, so that every chat template gets the same plain messages.

Templates do not check their input: the official one renders ``null`` content as "None", drops unknown roles, and shows
lists in Python syntax. This module normalizes or rejects all such input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from glm_jax.errors import PromptError
from glm_jax.text.tools import dump_prompt_json

ROLE_ALIASES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class InputToolCall:
    """A tool call in an earlier assistant message of the conversation."""

    id: str | None
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class InputMessage:
    """A checked message of the conversation.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: Text of the message.
        reasoning: Thinking from ``reasoning_content`` or ``reasoning``; None if the message has neither.
        tool_calls: Tool calls of an assistant message.
        tool_outputs: Results of a tool message with several; None if it has a single one, which is in ``content``.
        tool_call_id: Id of the call that a tool message answers.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[InputToolCall, ...] = ()
    tool_outputs: tuple[str, ...] | None = None
    tool_call_id: str | None = None

    def to_template_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it: reasoning under both of its names, and no empty fields."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in self.tool_calls
        ]
        fields = {
            "reasoning_content": self.reasoning,
            "reasoning": self.reasoning,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
        }
        content = self.content if self.tool_outputs is None else [{"output": output} for output in self.tool_outputs]
        return {"role": self.role, "content": content} | {k: v for k, v in fields.items() if v is not None}


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[InputMessage, ...]:
    """Parses messages in OpenAI's form; fields that no template shows (``name``, ``refusal``, …) are ignored.

    Raises:
        PromptError: if the list is empty, a role is unknown, content is not text, or a tool call is malformed. The
            error names the message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise PromptError("the conversation is empty: give at least one message")
    return tuple(_parse_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _parse_message(message: Mapping[str, Any], where: str) -> InputMessage:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLE_ALIASES:
        raise PromptError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLE_ALIASES)}")
    if message.get("function_call") is not None:
        raise PromptError(f"{where}: function_call is no longer supported; give tool_calls instead")
    where = f"{where} ({role})"
    content = message.get("content")
    if role == "tool":
        return _parse_tool_result(content, message.get("tool_call_id"), where)
    calls = _parse_tool_calls(message.get("tool_calls"), where)
    if calls and role != "assistant":
        raise PromptError(f"{where}: only an assistant message can have tool_calls")
    reasoning = _parse_reasoning(message, where) if role == "assistant" else None
    return InputMessage(ROLE_ALIASES[role], "".join(_texts(content, where)), reasoning, calls)


def _parse_tool_result(content: object, call_id: object, where: str) -> InputMessage:
    if call_id is not None and not isinstance(call_id, str):
        raise PromptError(f"{where}: tool_call_id must be a string, not {type(call_id).__name__}")
    if not isinstance(content, list | tuple) or not content:
        return InputMessage("tool", "".join(_texts(content, where)), tool_call_id=call_id)
    if all(isinstance(part, str) for part in content):
        return InputMessage("tool", "", tool_outputs=tuple(content), tool_call_id=call_id)
    if all(isinstance(part, Mapping) and "output" in part for part in content):
        outputs = (part["output"] for part in content)
        texts = tuple(item if isinstance(item, str) else dump_prompt_json(item, where) for item in outputs)
        return InputMessage("tool", "", tool_outputs=texts, tool_call_id=call_id)
    # As in vLLM, text parts of a tool result are joined by newlines, those of other messages by nothing.
    return InputMessage("tool", "\n".join(_texts(content, where)), tool_call_id=call_id)


def _texts(content: object, where: str) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if isinstance(content, list | tuple):
        return [_part_text(part, f"{where}, content[{index}]") for index, part in enumerate(content)]
    raise PromptError(f"{where}: content must be a string or a list of text parts, not {type(content).__name__}")


def _part_text(part: object, where: str) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "text"}:
            raise PromptError(f"{where}: a text part needs a string under 'text'")
        case {"type": str(kind)}:
            raise PromptError(f"{where}: parts of type {kind!r} are not supported; GLM-4.7-Flash reads text only")
    raise PromptError(f'{where}: a part must be a string or {{"type": "text", "text": …}}')


def _parse_reasoning(message: Mapping[str, Any], where: str) -> str | None:
    fields = {key: message[key] for key in ("reasoning_content", "reasoning") if message.get(key) is not None}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise PromptError(f"{where}: {key} must be a string, not {type(value).__name__}")
    if len(set(fields.values())) > 1:
        raise PromptError(f"{where}: reasoning and reasoning_content differ; give one of them")
    return next(iter(fields.values()), None)


def _parse_tool_calls(calls: object, where: str) -> tuple[InputToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list | tuple):
        raise PromptError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    return tuple(_parse_tool_call(call, f"{where}, tool_calls[{index}]") for index, call in enumerate(calls))


def _parse_tool_call(call: object, where: str) -> InputToolCall:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise PromptError(f'{where} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}')
    name, call_id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise PromptError(f"{where} has no function name")
    if call_id is not None and not isinstance(call_id, str):
        raise PromptError(f"{where}: id must be a string, not {type(call_id).__name__}")
    return InputToolCall(call_id, name, _parse_arguments(function.get("arguments"), where))


def _parse_arguments(arguments: object, where: str) -> Mapping[str, Any]:
    """Returns the arguments as an object. Clients send JSON text, or "" for a call without arguments."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: arguments are not valid JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{where}: arguments must be an object, not {type(arguments).__name__}")
    if any(not isinstance(key, str) for key in arguments):
        raise PromptError(f"{where}: argument names must be strings")
    return arguments
