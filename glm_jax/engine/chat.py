"""Completions of chat prompts, split into reasoning, content and tool calls. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from glm_jax.engine.outputs import ChatCompletion, Completion, StreamChunk
from glm_jax.errors import PromptError
from glm_jax.text import Delta, Message, OutputParser, opens_thinking


@dataclasses.dataclass(frozen=True, slots=True)
class ChatResponseFormat:
    """How the answers to one prompt are to be read.

    Attributes:
        tools: of the request.
        tool_choice: which of them an answer may call.
        thinking: whether the prompt leaves the thinking open.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    thinking: bool

    @classmethod
    def from_prompt(
        cls, prompt: str, tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any]
    ) -> Self:
        """The format of the answers to a rendered prompt.

        Raises:
            PromptError: if ``tools`` or ``tool_choice`` is malformed, or ``tool_choice`` demands a call.
        """
        if tool_choice == "required":
            raise PromptError(
                'tool_choice "required" cannot be promised, for nothing forces a call: '
                'use "auto" and look at tool_calls'
            )
        # Without tools, their tags are text.
        found = cls(tools, "none" if tool_choice == "auto" and not tools else tool_choice, opens_thinking(prompt))
        found.make_parser()
        return found

    def make_parser(self) -> OutputParser:
        """A parser for one answer."""
        return OutputParser(self.tools, self.tool_choice, self.thinking)

    def to_chat_completion(self, completion: Completion) -> ChatCompletion:
        """A completion with its parts."""
        parser = self.make_parser()
        parser.feed(completion.text)
        return _to_chat_completion(completion, parser)


class ChatStream(Iterator[Delta]):
    """An answer as it is written.

    Attributes:
        completion: the whole answer, once the stream has ended.
    """

    def __init__(self, chunks: Iterator[StreamChunk], parser: OutputParser) -> None:
        self.completion: ChatCompletion | None = None
        self._deltas = self._iter_deltas(chunks, parser)

    def __next__(self) -> Delta:
        return next(self._deltas)

    def _iter_deltas(self, pieces: Iterator[StreamChunk], parser: OutputParser) -> Iterator[Delta]:
        for piece in pieces:
            yield from parser.feed(piece.text)
            if piece.completion:
                yield from parser.flush()
                self.completion = _to_chat_completion(piece.completion, parser)


def _to_chat_completion(done: Completion, parser: OutputParser) -> ChatCompletion:
    message: Message = parser.finish("stop" if done.finish_reason == "tool_calls" else done.finish_reason)
    whole = {field.name: getattr(done, field.name) for field in dataclasses.fields(Completion)}
    return ChatCompletion(**{**whole, "finish_reason": message.finish_reason}, message=message)
