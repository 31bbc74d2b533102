"""Chat: conversations to prompts, and completions to reasoning, content and tool calls. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

from glm_jax.engine.outputs import ChatCompletion, Completion, StreamChunk
from glm_jax.errors import PromptError
from glm_jax.text import Delta, OutputParser, opens_thinking, render_chat

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]]
ToolChoice: TypeAlias = str | Mapping[str, Any]
_RESERVED_SWITCHES = frozenset(["template", "add_generation_prompt"])


def render_chat_prompt(
    messages: Messages, tools: Tools | None, template: str | None, switches: Mapping[str, Any]
) -> str:
    """Renders a conversation as a prompt that ends where the model's answer begins.

    Args:
        messages: Conversation in OpenAI's form.
        tools: Functions that the model may call, in OpenAI's form.
        template: Source of the model's chat template; None for the official one.
        switches: Switches of the template.

    Raises:
        PromptError: if the conversation, a tool or a switch is malformed.
    """
    if reserved := sorted(switches.keys() & _RESERVED_SWITCHES):
        raise PromptError(f"{reserved[0]} is not a switch of the chat template: answers use the model's own")
    return render_chat(messages, tools, template=template, **switches)


@dataclasses.dataclass(frozen=True, slots=True)
class ChatResponseFormat:
    """How the completions of one chat prompt are parsed.

    Attributes:
        tools: Tools of the request, in OpenAI's form.
        tool_choice: Which tools a completion may call.
        thinking: Whether the prompt ends with an open thinking tag, so that completions start with reasoning.
    """

    tools: Tools | None
    tool_choice: ToolChoice
    thinking: bool

    @classmethod
    def from_prompt(cls, prompt: str, tools: Tools | None, tool_choice: ToolChoice) -> Self:
        """Derives the format from a rendered chat prompt.

        Raises:
            PromptError: if ``tools`` or ``tool_choice`` is malformed, or ``tool_choice`` requires a call.
        """
        if tool_choice == "required":
            raise PromptError(
                'tool_choice "required" cannot be promised, for nothing forces a call: '
                'use "auto" and look at tool_calls'
            )
        # Without tools, the tags of tool calls are plain text.
        choice = "none" if tool_choice == "auto" and not tools else tool_choice
        response_format = cls(tools, choice, opens_thinking(prompt))
        response_format.make_parser()  # raises on malformed tools before anything is generated
        return response_format

    def make_parser(self) -> OutputParser:
        """A parser for one completion."""
        return OutputParser(self.tools, self.tool_choice, self.thinking)

    def to_chat_completion(self, completion: Completion) -> ChatCompletion:
        """Parses a finished completion."""
        parser = self.make_parser()
        parser.feed(completion.text)
        return _with_message(completion, parser)


class ChatStream(Iterator[Delta]):
    """Deltas of one answer, while it is generated.

    Attributes:
        completion: The whole answer, once the stream has ended; None before.
    """

    def __init__(self, chunks: Iterator[StreamChunk], parser: OutputParser) -> None:
        self.completion: ChatCompletion | None = None
        self._deltas = self._iter_deltas(chunks, parser)

    def __next__(self) -> Delta:
        return next(self._deltas)

    def _iter_deltas(self, chunks: Iterator[StreamChunk], parser: OutputParser) -> Iterator[Delta]:
        for chunk in chunks:
            yield from parser.feed(chunk.text)
            if chunk.completion:
                yield from parser.flush()
                self.completion = _with_message(chunk.completion, parser)


def _with_message(completion: Completion, parser: OutputParser) -> ChatCompletion:
    """The completion with the message of a parser that has read all of its text."""
    reason = completion.finish_reason
    message = parser.finish("stop" if reason == "tool_calls" else reason)
    fields = {field.name: getattr(completion, field.name) for field in dataclasses.fields(Completion)}
    return ChatCompletion(**{**fields, "finish_reason": message.finish_reason}, message=message)
