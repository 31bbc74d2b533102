"""What an answer consists of, whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote.

    Attributes:
        id: made here, unique; equality ignores it.
        name: the function.
        arguments: its arguments, typed by the tool's schema. Of an incomplete call, those that were finished.
        arguments_json: the same as JSON text, as it was streamed; of an incomplete call it breaks off, and is "" where
            nothing had come yet.
        complete: whether the call was closed and every key had a value. Never act on one that is not.
    """

    id: str = field(compare=False)
    name: str
    arguments: dict[str, Any]
    arguments_json: str
    complete: bool


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call: the first has ``id`` and ``name``, all others only text to append to the arguments' JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer, of one kind: the other fields are empty."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A whole answer.

    Attributes:
        reasoning: the thinking, without white space at its end; None where there is none.
        content: the answer's text; None where there is none.
        tool_calls: complete calls, in order.
        finish_reason: "tool_calls" where there are complete calls, unless the answer was cut ("length"), given up
            ("abort") or bound to one named tool ("stop").
        incomplete_calls: calls that were cut off or had a key without a value.
    """

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]
    finish_reason: FinishReason
    incomplete_calls: list[ToolCall] = field(default_factory=list)

    def as_turn(self) -> dict[str, Any]:
        """The message to append to a conversation, in OpenAI's form; incomplete calls are left out."""
        turn: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
                for call in self.tool_calls
            ]
        return turn


def join_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """The same pieces with neighbors of one kind joined; the first of a call stays apart from its arguments."""
    return [_joined(list(group)) for _, group in groupby(deltas, _kind)]


def _kind(delta: Delta) -> tuple[bool, bool, int, str | None]:
    call = delta.tool_call
    return bool(delta.content), bool(delta.reasoning), call.index if call else -1, call.id if call else None


def _joined(group: list[Delta]) -> Delta:
    calls = [delta.tool_call for delta in group if delta.tool_call]
    call = None
    if calls:
        call = ToolCallDelta(calls[0].index, calls[0].id, calls[0].name, "".join(part.arguments for part in calls))
    return Delta("".join(d.content for d in group), "".join(d.reasoning for d in group), call)
