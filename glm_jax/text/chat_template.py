"""The chat template: messages to prompt text.

GLM-4.7-Flash's own template is written in Python here; a checkpoint's different template is rendered in a sandbox. The
format has no newlines between role tags and text. Source: ``chat_template.jinja`` of zai-org/GLM-4.7-Flash. The output
is identical for every conversation that :mod:`glm_jax.text.messages` accepts.
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
"""Hash of the official template's text, with Unix line endings and without white space at the end."""

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
    """Renders the prompt of a conversation.

    Args:
        messages: Messages in OpenAI's form. Content is a string, null, or a list of text parts. The role ``developer``
            means ``system``. A tool call's arguments are an object or JSON text. Thinking is in ``reasoning_content``
            or ``reasoning``, or inline in ``<think>…</think>``.
        tools: Function objects in OpenAI's form.
        template: Text of a checkpoint's ``chat_template.jinja``. None and the official text mean the official
            template; Jinja renders any other in a child process with limits on time, memory and output.
        add_generation_prompt: Whether the prompt ends with the tag that makes the model answer.
        **switches: Options of the template; those that are None are ignored. The official template has
            ``enable_thinking`` (default true) and ``clear_thinking`` (default true: thinking before the last user
            message is left out). Any other template has the variables that it reads.

    Raises:
        PromptError: if a message, tool or switch is malformed or unknown, or a template in the sandbox fails.
    """
    conversation, functions = parse_messages(messages), parse_tools(tools)
    switches = {name: value for name, value in switches.items() if value is not None}
    if template is None or is_official(template):
        return "".join(_render(conversation, functions, add_generation_prompt, **_check_switches(switches)))
    return render_template(
        template,
        {
            "messages": [message.to_template_dict() for message in conversation],
            "tools": [dict(tool.declaration) for tool in functions] or None,
            "add_generation_prompt": add_generation_prompt,
        },
        switches,
    )


def is_official(template: str) -> bool:
    """Whether a template is the official one; line endings and white space at the end do not matter."""
    text = template.replace("\r\n", "\n").rstrip()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == OFFICIAL_TEMPLATE_SHA256


def read_template(folder: str | Path) -> str | None:
    """Reads a checkpoint's chat template from ``chat_template.jinja`` or ``tokenizer_config.json``.

    Of several named templates the one named "default" is taken. Returns None if the checkpoint has no template.

    Raises:
        CheckpointError: if a file exists but cannot be read.
    """
    folder = Path(folder)
    if (text := _read_text(folder / "chat_template.jinja")) is not None:
        return text
    try:
        config = json.loads(_read_text(folder / "tokenizer_config.json") or "{}")
    except ValueError as error:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} is not JSON: {error}") from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _check_switches(switches: Mapping[str, Any]) -> dict[str, bool]:
    for name, value in switches.items():
        if name not in _OFFICIAL_SWITCHES:
            raise PromptError(f"unknown switch {name!r}: the chat template knows {' and '.join(_OFFICIAL_SWITCHES)}")
        if not isinstance(value, bool):
            raise PromptError(f"{name} must be true or false, not {value!r}")
    return dict(switches)


def _render(
    messages: Sequence[InputMessage],
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
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            yield from _render_assistant(message, keep_reasoning=index > last_user or not clear_thinking)
        elif message.role == "tool":
            yield from _render_tool_result(message, follows_result=index > 0 and messages[index - 1].role == "tool")
        else:
            yield f"<|{message.role}|>{message.content}"
    if add_generation_prompt:
        yield "<|assistant|>" + ("<think>" if enable_thinking else "</think>")


def _render_assistant(message: InputMessage, keep_reasoning: bool) -> Iterator[str]:
    reasoning, content = message.reasoning, message.content
    if reasoning is None:
        reasoning, content = _split_inline_reasoning(content)
    yield "<|assistant|>"
    yield f"<think>{reasoning.strip()}</think>" if reasoning and keep_reasoning else "</think>"
    yield content.strip()
    for call in message.tool_calls:
        yield from _render_call(call)


def _split_inline_reasoning(content: str) -> tuple[str, str]:
    """Splits ``<think>thinking</think>answer`` into thinking and answer."""
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


def _render_tool_result(message: InputMessage, follows_result: bool) -> Iterator[str]:
    if message.tool_outputs is None:
        yield ("" if follows_result else "<|observation|>") + f"<tool_response>{message.content}</tool_response>"
        return
    # As in the official template, a message with several results always begins a new observation.
    yield "<|observation|>"
    for output in message.tool_outputs:
        yield f"<tool_response>{output}</tool_response>"
