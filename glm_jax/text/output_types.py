"""The result types of parsing: a whole answer (``Message``) and the pieces of a stream (``Delta``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

StopReason = Literal["stop", "length", "abort"]
"""Why generation ended: a stop token or string, a length limit, or cancellation."""

FinishReason = Literal["stop", "length", "tool_calls", "abort"]
"""Why an answer ended, in OpenAI's words: a :data:`StopReason`, or "tool_calls" if it stopped after complete calls."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call in the model's answer.

    Attributes:
        id: Random unique id; comparisons ignore it.
        name: Name of the function.
        arguments: Arguments, typed by the tool's schema. An incomplete call has those that were finished.
        arguments_json: Arguments as JSON text, as it was streamed. The text of an incomplete call breaks off; it is ""
            if no argument had begun.
        complete: Whether the call was closed and every key had a value. Never execute an incomplete call.
    """

    id: str = field(compare=False)
    name: str
    arguments: dict[str, Any]
    arguments_json: str
    complete: bool


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call. The first has ``id`` and ``name``; later ones append to the arguments' JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. One field is set; the others are empty."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A parsed answer.

    Attributes:
        reasoning: Thinking, without white space at its end; None if there is none.
        content: Text of the answer; None if there is none.
        tool_calls: Complete tool calls, in order.
        finish_reason: "tool_calls" for an answer with complete calls, unless it was cut off ("length"), canceled
            ("abort"), or ``tool_choice`` named a single tool ("stop").
        incomplete_calls: Calls that were cut off or have a key without a value.
    """

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]
    finish_reason: FinishReason
    incomplete_calls: list[ToolCall] = field(default_factory=list)

    def as_turn(self) -> dict[str, Any]:
        """The message in OpenAI's form, to append to the conversation. Incomplete calls are left out."""
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
    """Joins neighboring deltas of one kind. The first delta of a call stays separate from its arguments."""
    return [_join(list(group)) for _, group in groupby(deltas, _kind)]


def _kind(delta: Delta) -> tuple[bool, bool, int, str | None]:
    call = delta.tool_call
    return bool(delta.content), bool(delta.reasoning), call.index if call else -1, call.id if call else None


def _join(group: list[Delta]) -> Delta:
    calls = [delta.tool_call for delta in group if delta.tool_call]
    call = None
    if calls:
        call = ToolCallDelta(calls[0].index, calls[0].id, calls[0].name, "".join(part.arguments for part in calls))
    return Delta("".join(d.content for d in group), "".join(d.reasoning for d in group), call)
