"""Streaming parser that splits the model's answer into reasoning, content and tool calls.

The grammar of an answer; the opening ``<think>`` belongs to the prompt::

    answer := [reasoning "</think>"] content? call*
    call   := "<tool_call>" NAME pair* "</tool_call>"
    pair   := "<arg_key>" KEY "</arg_key>" ws* "<arg_value>" VALUE "</arg_value>"

The parser never invents an argument. Outside the grammar it does this:

* A ``<tool_call>`` without a name after it is text.
* A call that is cut off, or has a key without a value, is reported as incomplete.
* Inside a value, every tag except ``</arg_value>`` is part of the value.
* Text between the pairs of a call is dropped.
* If the request has tools, calls to any other tool are dropped.

Each character is scanned once, except for a tag or a name that two pieces share.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from glm_jax.errors import PromptError
from glm_jax.text.output_builders import TextBuilder, ToolCallBuilder
from glm_jax.text.output_types import Delta, FinishReason, Message, StopReason, ToolCall, ToolCallDelta, join_deltas
from glm_jax.text.tools import named_tool_choice, parse_tools, select_callable_tools


class _State(enum.Enum):
    REASONING = enum.auto()
    CONTENT = enum.auto()
    NAME = enum.auto()  # after <tool_call>
    PAIRS = enum.auto()  # between pairs
    KEY = enum.auto()
    AFTER_KEY = enum.auto()
    VALUE = enum.auto()


_CALL_TAGS: Final = {
    _State.NAME: ("<arg_key>", "</tool_call>", "<tool_call>"),
    _State.PAIRS: ("<arg_key>", "<arg_value>", "</tool_call>", "<tool_call>"),
    _State.KEY: ("</arg_key>", "</tool_call>"),
    _State.AFTER_KEY: ("<arg_value>", "<arg_key>", "</tool_call>"),
    _State.VALUE: ("</arg_value>",),
}
_NAME: Final = re.compile(r"\s*([^\s<>]*)\s*")
_MAX_NAME_LENGTH: Final = 512  # of a name with the white space around it
_LAST_ROLE: Final = re.compile(r".*<\|(?:assistant|user|system|observation)\|>", re.DOTALL)


class OutputParser:
    """Parses one answer as it is generated.

    :meth:`feed` takes each piece of text, :meth:`flush` ends the text, and :meth:`finish` returns the whole answer. The
    resulting message does not depend on how the text is cut into pieces, and the joined deltas equal the message.

    Args:
        tools: Tools of the request, in OpenAI's form. With tools, calls to any other tool are dropped, and content
            neither begins with white space nor, if there are calls, ends with it. Without tools every call is
            accepted, and its arguments are strings.
        tool_choice: "auto", "required", or the object that names a tool. "none" drops all calls; without tools it
            makes their tags plain text.
        thinking: Whether the prompt ends with an open ``<think>``. If not, thinking tags are plain text.

    Raises:
        PromptError: if ``tools`` or ``tool_choice`` is malformed.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        thinking: bool = True,
    ) -> None:
        functions = parse_tools(tools)
        self._declared = [tool.name for tool in functions]
        self._callable = select_callable_tools(functions, tool_choice)
        self._is_named = named_tool_choice(tool_choice) is not None
        may_call = bool(functions) or self._callable is None
        text_tags = (("<think>", "</think>") if thinking else ()) + (("<tool_call>",) if may_call else ())
        self._tags = {**_CALL_TAGS, _State.REASONING: text_tags, _State.CONTENT: text_tags}
        self._search = {state: re.compile("|".join(tags) or "(?!)") for state, tags in self._tags.items()}
        self._state = _State.REASONING if thinking else _State.CONTENT
        self._resume = self._state  # state to return to after a <tool_call> that is text
        self._text, self._position = "", 0
        self._reasoning = TextBuilder(strip_start=False)
        self._content = TextBuilder(strip_start=bool(functions) and tool_choice != "none")
        self._calls: list[ToolCallBuilder] = []
        self._call: ToolCallBuilder | None = None  # the open call; None in a call that is dropped
        self._is_well_formed = True  # whether every key of the open call has a value
        self._key: list[str] = []
        self._cut_name: str | None = None
        self._deltas: list[Delta] = []
        self._flushed = False

    def feed(self, piece: str) -> list[Delta]:
        """Parses the next piece of text and returns the new deltas.

        Raises:
            RuntimeError: after :meth:`flush`.
        """
        if self._flushed:
            raise RuntimeError("this answer has ended: create a new OutputParser for the next one")
        self._text += piece
        self._advance(final=False)
        return self._take_deltas()

    def flush(self) -> list[Delta]:
        """Ends the text and returns the deltas that were held back; further calls return no delta."""
        if not self._flushed:
            self._advance(final=True)
            self._flushed = True
            self._reasoning.end(keep_trailing_space=False)
            self._show(content=self._content.end(keep_trailing_space=not self._calls))
        return self._take_deltas()

    def finish(self, reason: StopReason = "stop") -> Message:
        """Returns the whole answer; ``reason`` tells why generation ended.

        Raises:
            PromptError: if ``reason`` is not "stop", "length" or "abort".
        """
        if reason not in ("stop", "length", "abort"):
            raise PromptError(f'finish_reason must be "stop", "length" or "abort", not {reason!r}')
        self.flush()
        calls = [call.result() for call in self._calls]
        complete = [call for call in calls if call.complete]
        finish_reason: FinishReason = reason
        if reason == "stop" and complete and not self._is_named:
            finish_reason = "tool_calls"
        incomplete = [call for call in calls if not call.complete]
        if self._cut_name is not None:
            incomplete.append(ToolCall("", self._cut_name, {}, "", complete=False))
        return Message(self._reasoning.result(), self._content.result(), complete, finish_reason, incomplete)

    def _advance(self, final: bool) -> None:
        while self._position < len(self._text) or (final and self._state is _State.NAME):
            advanced = self._step_name(final) if self._state is _State.NAME else self._step(final)
            if not advanced:
                break
        self._text, self._position = self._text[self._position :], 0

    def _step(self, final: bool) -> bool:
        """Consumes text up to and including the next tag; returns False if there is no further tag."""
        tag = self._search[self._state].search(self._text, self._position)
        end = tag.start() if tag else len(self._text) if final else self._safe_end()
        self._add(self._text[self._position : end])
        self._position = tag.end() if tag else end
        if tag and self._state in (_State.REASONING, _State.CONTENT):
            self._on_text_tag(tag[0])
        elif tag:
            self._on_call_tag(tag[0])
        return tag is not None

    def _safe_end(self) -> int:
        """End of the text that cannot be the beginning of a tag."""
        tags = self._tags[self._state]
        longest = max(map(len, tags), default=1)
        start = self._text.rfind("<", max(self._position, len(self._text) - longest + 1))
        is_open = start >= 0 and any(tag.startswith(self._text[start:]) for tag in tags)
        return start if is_open else len(self._text)

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._state is _State.REASONING:
            self._show(reasoning=self._reasoning.add(text))
        elif self._state is _State.CONTENT:
            self._show(content=self._content.add(text))
        elif self._state is _State.KEY:
            self._key.append(text)
        elif self._state is _State.VALUE and self._call:
            self._show_arguments(self._call.add_value(text))

    def _on_text_tag(self, tag: str) -> None:
        if tag == "<tool_call>":
            self._resume, self._state = self._state, _State.NAME
        else:
            self._state = _State.REASONING if tag == "<think>" else _State.CONTENT

    def _step_name(self, final: bool) -> bool:
        """Consumes ``NAME`` and the tag after it; returns False if more text is needed to decide."""
        match = _NAME.match(self._text, self._position, self._position + _MAX_NAME_LENGTH)
        assert match is not None
        rest = self._text[match.end() : match.end() + len("</tool_call>")]
        is_short = len(match[0]) < _MAX_NAME_LENGTH
        tag = next((tag for tag in _CALL_TAGS[_State.NAME] if is_short and rest.startswith(tag)), None)
        may_follow = is_short and any(tag.startswith(rest) for tag in _CALL_TAGS[_State.NAME])
        if tag in ("<arg_key>", "</tool_call>"):
            self._position = match.end() + len(tag)
            self._open_call(match[1])
            self._on_call_tag(tag)
        elif tag or not may_follow or (final and not self._may_begin_name(match[1])):
            self._state = self._resume
            self._add("<tool_call>")
        elif final:
            self._position, self._state = len(self._text), _State.PAIRS
            if self._callable is None or any(name.startswith(match[1]) for name in self._callable):
                self._cut_name = match[1]
        else:
            return False
        return True

    def _may_begin_name(self, text: str) -> bool:
        return not self._declared or any(name.startswith(text) for name in self._declared)

    def _open_call(self, name: str) -> None:
        self._state, self._is_well_formed = _State.PAIRS, True
        tool = self._callable.get(name) if self._callable is not None else None
        if name and (tool or self._callable is None):
            self._call = ToolCallBuilder(len(self._calls), name, tool.properties if tool else {})
            self._calls.append(self._call)
            self._deltas.append(Delta(tool_call=ToolCallDelta(self._call.index, self._call.id, name)))

    def _on_call_tag(self, tag: str) -> None:
        if tag == "<arg_key>":
            self._is_well_formed &= self._state is not _State.AFTER_KEY
            self._state, self._key = _State.KEY, []
        elif tag == "</arg_key>":
            self._state = _State.AFTER_KEY
        elif tag == "<arg_value>" and self._state is _State.AFTER_KEY:
            self._state = _State.VALUE
            self._show_arguments(self._call.open_value("".join(self._key).strip()) if self._call else "")
        elif tag == "</arg_value>":
            self._state = _State.PAIRS
            self._show_arguments(self._call.close_value() if self._call else "")
        elif tag == "<arg_value>":  # a value without a key
            self._is_well_formed = False
        else:
            self._end_call(tag)

    def _end_call(self, tag: str) -> None:
        """Ends the open call: ``</tool_call>`` completes it, ``<tool_call>`` cuts it off and begins another."""
        if self._call and tag == "</tool_call>" and self._is_well_formed and self._state is _State.PAIRS:
            self._show_arguments(self._call.close())
        self._call = None
        self._resume = _State.CONTENT
        self._state = _State.CONTENT if tag == "</tool_call>" else _State.NAME

    def _show(self, content: str = "", reasoning: str = "") -> None:
        if content or reasoning:
            self._deltas.append(Delta(content, reasoning))

    def _show_arguments(self, piece: str) -> None:
        if piece and self._call:
            self._deltas.append(Delta(tool_call=ToolCallDelta(self._call.index, arguments=piece)))

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return join_deltas(deltas)


def parse_output(
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    thinking: bool = True,
    finish_reason: StopReason = "stop",
) -> Message:
    """Parses a whole answer; see :class:`OutputParser` for the arguments.

    Raises:
        PromptError: if ``tools``, ``tool_choice`` or ``finish_reason`` is malformed.
    """
    parser = OutputParser(tools, tool_choice, thinking)
    parser.feed(text)
    return parser.finish(finish_reason)


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends with an open ``<think>``, so that the answer begins with reasoning.

    This is the value for the parser's ``thinking``. Only text after the last role tag counts, because earlier messages
    contain thinking tags of their own.
    """
    turn = prompt[match.end() :] if (match := _LAST_ROLE.match(prompt)) else prompt
    return turn.rfind("<think>") > turn.rfind("</think>")
