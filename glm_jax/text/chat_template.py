"""Messages to prompt text: GLM-4.7-Flash's own chat template in Python, and any other checkpoint's in a sandbox.

The format has no newlines between role tags and text. Source: ``chat_template.jinja`` of zai-org/GLM-4.7-Flash, with
whose output this module's agrees on everything that :mod:`glm_jax.text.messages` lets through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from glm_jax.errors import CheckpointError, PromptError
from glm_jax.text.messages import InputMessage, InputToolCall, parse_messages
from glm_jax.text.sandbox import render_template
from glm_jax.text.tools import Tool, dump_prompt_json, parse_tools

OFFICIAL_TEMPLATE_SHA256: Final = "d63ad536c3c81880043e22ec7fd08db42b4d8fb7c89c7138bc562bfa25281375"
"""Of the official template's text, with Unix line ends and no white space at the end."""

_OFFICIAL_SWITCHES: Final = ("enable_thinking", "clear_thinking")
_TOOLS_PREFIX: Final = """<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_TOOLS_SUFFIX: Final = (
    """</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"""
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    **switches: Any,
) -> str:
    """The prompt for a conversation.

    Args:
        messages: in OpenAI's form. Content is a string, null, or text parts; ``developer`` is ``system``; a call's
            arguments are an object or JSON text; thinking is in ``reasoning_content`` or ``reasoning``, or inline in
            ``<think>…</think>``.
        tools: function objects in OpenAI's form.
        template: text of a checkpoint's ``chat_template.jinja``. None and the official text mean the official
            template, written in Python; any other is rendered by Jinja in a child process within limits.
        add_generation_prompt: ends with the tag that makes the model answer.
        **switches: for the official template ``enable_thinking`` (default true) and ``clear_thinking`` (default true:
            thinking before the last user message is left out); for another, variables that it reads. None is
            "not given".

    Raises:
        PromptError: if a message, tool or switch is malformed or unknown, or another template fails.
    """
    turns, read = parse_messages(messages), parse_tools(tools)
    given = {name: value for name, value in switches.items() if value is not None}
    if template is None or is_official(template):
        return "".join(_render(turns, read, add_generation_prompt, **_check_switches(given)))
    return render_template(
        template,
        {
            "messages": [turn.to_template_dict() for turn in turns],
            "tools": [dict(tool.declaration) for tool in read] or None,
            "add_generation_prompt": add_generation_prompt,
        },
        given,
    )


def is_official(template: str) -> bool:
    """Whether a template's text is the official one (line ends and white space at the end aside)."""
    text = template.replace("\r\n", "\n").rstrip()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == OFFICIAL_TEMPLATE_SHA256


def read_template(folder: str | Path) -> str | None:
    """A checkpoint's own chat template: ``chat_template.jinja``, else ``chat_template`` of ``tokenizer_config.json``.

    Of several named ones, "default" is taken. None where there is none.

    Raises:
        CheckpointError: if a file is there but cannot be read.
    """
    folder = Path(folder)
    if (text := _read_text(folder / "chat_template.jinja")) is not None:
        return text
    try:
        config = json.loads(_read_text(folder / "tokenizer_config.json") or "{}")
    except ValueError as error:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} is not JSON: {error}") from error
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _check_switches(given: Mapping[str, Any]) -> dict[str, bool]:
    for name, value in given.items():
        if name not in _OFFICIAL_SWITCHES:
            raise PromptError(f"unknown switch {name!r}: the chat template knows {' and '.join(_OFFICIAL_SWITCHES)}")
        if not isinstance(value, bool):
            raise PromptError(f"{name} must be true or false, not {value!r}")
    return dict(given)


def _render(
    turns: Sequence[InputMessage],
    tools: Sequence[Tool],
    add_generation_prompt: bool,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
) -> Iterator[str]:
    yield "[gMASK]<sop>"
    if tools:
        yield _TOOLS_PREFIX
        for index, tool in enumerate(tools):
            yield dump_prompt_json(tool.declaration, f"tools[{index}]") + "\n"
        yield _TOOLS_SUFFIX
    last_user = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            yield from _render_assistant(turn, keep_reasoning=index > last_user or not clear_thinking)
        elif turn.role == "tool":
            yield from _render_tool_result(turn, follows_result=index > 0 and turns[index - 1].role == "tool")
        else:
            yield f"<|{turn.role}|>{turn.content}"
    if add_generation_prompt:
        yield "<|assistant|>" + ("<think>" if enable_thinking else "</think>")


def _render_assistant(turn: InputMessage, keep_reasoning: bool) -> Iterator[str]:
    reasoning, content = turn.reasoning, turn.content
    if reasoning is None:
        reasoning, content = _split_inline_reasoning(content)
    yield "<|assistant|>"
    yield f"<think>{reasoning.strip()}</think>" if reasoning and keep_reasoning else "</think>"
    yield content.strip()
    for call in turn.tool_calls:
        yield from _render_call(call)


def _split_inline_reasoning(content: str) -> tuple[str, str]:
    """Thinking and answer of ``<think>thinking</think>answer``."""
    before, closed, _ = content.partition("</think>")
    if not closed:
        return "", content
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), content.split("</think>")[-1].lstrip("\n")


def _render_call(call: InputToolCall) -> Iterator[str]:
    yield f"<tool_call>{call.name}"
    for key, value in call.arguments.items():
        text = value if isinstance(value, str) else dump_prompt_json(value, f"the argument {key!r} of {call.name!r}")
        yield f"<arg_key>{key}</arg_key><arg_value>{text}</arg_value>"
    yield "</tool_call>"


def _render_tool_result(turn: InputMessage, follows_result: bool) -> Iterator[str]:
    if turn.tool_outputs is None:
        yield ("" if follows_result else "<|observation|>") + f"<tool_response>{turn.content}</tool_response>"
        return
    # A message with several results opens an observation of its own, wherever it stands; the official template does.
    yield "<|observation|>"
    for output in turn.tool_outputs:
        yield f"<tool_response>{output}</tool_response>"
