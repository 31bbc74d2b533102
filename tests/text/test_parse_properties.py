"""The parsed answer does not depend on how the text is cut into pieces; the work per character is bounded."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.text import Delta, Message, OutputParser, output_parser, parse_output, render_chat
from tests.text.fixtures import TOOLS

TAGS = [f"<{slash}{name}>" for name in ("think", "tool_call", "arg_key", "arg_value") for slash in ("", "/")]
WORDS = [
    "get_weather",
    "get_time",
    "search",
    "city",
    "limit",
    "12",
    "null",
    "{}",
    '"',
    "\\",
    "🙂",
    "é",
    "x y",
    "<|user|>",
]
SPACES = [" ", "\n", "\n\n", "\t ", "\u00a0"]
HALF = ["<", "</", "<think", "</tool_cal", "<arg_v", ">"]
PAIR = "<arg_key>city</arg_key><arg_value>Paris</arg_value>"

hostile = st.lists(
    st.sampled_from(TAGS) | st.sampled_from([*WORDS, *SPACES, *HALF, PAIR, "<tool_call>get_weather"]), max_size=25
).map("".join)
options = st.fixed_dictionaries(
    {"thinking": st.booleans()},
    optional={
        "tools": st.sampled_from([TOOLS, TOOLS[:1]]),
        "tool_choice": st.sampled_from(["auto", "none"]),
    },
)
reasons = st.sampled_from(["stop", "length", "abort"])


def cut(text: str, positions: list[int]) -> list[str]:
    ends = sorted({min(position, len(text)) for position in positions} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


def check_deltas(deltas: list[Delta], message: Message) -> None:
    """The joined deltas equal the message, and each delta has one kind and is not empty."""
    assert "".join(d.content for d in deltas) == (message.content or "")
    assert "".join(d.reasoning for d in deltas) == (message.reasoning or "")
    assert all(bool(d.content) + bool(d.reasoning) + bool(d.tool_call) == 1 for d in deltas)
    calls = {call.id: call for call in [*message.tool_calls, *message.incomplete_calls] if call.id}
    pieces = [d.tool_call for d in deltas if d.tool_call]
    starts = [piece for piece in pieces if piece.id]
    assert [piece.index for piece in starts] == list(range(len(starts)))
    assert {piece.id for piece in starts} == set(calls)
    for start in starts:
        assert start.name == calls[start.id].name
        own = [piece for piece in pieces if piece.index == start.index]
        assert own[0] is start
        assert "".join(piece.arguments for piece in own) == calls[start.id].arguments_json


@given(text=hostile, positions=st.lists(st.integers(0, 300), max_size=30), options=options, reason=reasons)
def test_any_cut_gives_the_same_message(text, positions, options, reason):
    whole = parse_output(text, finish_reason=reason, **options)
    for pieces in (cut(text, positions), list(text)):
        parser = OutputParser(**options)
        deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.flush()
        message = parser.finish(reason)
        assert message == whole
        check_deltas(deltas, message)


@given(text=hostile, options=options, reason=reasons)
def test_every_message_is_consistent(text, options, reason):
    message = parse_output(text, finish_reason=reason, **options)
    assert all(call.complete and call.name for call in message.tool_calls)
    assert all(json.loads(call.arguments_json) == call.arguments for call in message.tool_calls)
    assert not any(call.complete for call in message.incomplete_calls)
    assert message.content != ""
    assert message.reasoning is None or message.reasoning == message.reasoning.rstrip() != ""
    assert message.finish_reason == ("tool_calls" if message.tool_calls and reason == "stop" else reason)
    if not options["thinking"]:
        assert message.reasoning is None


@given(text=hostile)
def test_without_thinking_and_calls_the_text_is_the_answer(text):
    message = parse_output(text, thinking=False, tool_choice="none")
    assert (message.content or "") == text


@given(text=hostile)
def test_no_text_is_lost_without_a_call(text):
    called = re.search(r"<tool_call>\s*[^\s<>]*\s*(<arg_key>|</tool_call>|(</tool_call|<arg_key|</?t?o?o?l?)?\Z)", text)
    message = parse_output(text, thinking=False)
    if not called and not message.incomplete_calls:
        assert (message.content or "") == text


prose = st.lists(st.sampled_from([*WORDS, *SPACES, "a", "<b>"]), max_size=5).map("".join)
values = st.lists(st.sampled_from([*WORDS, *SPACES, *TAGS[:-1]]), max_size=4).map("".join)
CALLS = {
    "get_weather": st.fixed_dictionaries({}, optional={"city": values, "days": st.integers(), "exact": st.booleans()}),
    "search": st.fixed_dictionaries(
        {"query": values},
        optional={
            "filters": st.dictionaries(st.text(max_size=3), prose, max_size=2),
            "limit": st.none() | st.integers(),
        },
    ),
    "get_time": st.just({}),
}
calls = st.lists(st.sampled_from(sorted(CALLS)).flatmap(lambda name: st.tuples(st.just(name), CALLS[name])), max_size=3)


@given(reasoning=prose, content=prose, calls=calls, size=st.integers(1, 40))
def test_output_parser_inverts_the_chat_template(reasoning, content, calls, size):
    written = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    turn = {"role": "assistant", "content": content, "reasoning": reasoning, "tool_calls": written}
    text = render_chat([turn], TOOLS, add_generation_prompt=False).rpartition("<|assistant|>")[2]
    parser = OutputParser(TOOLS)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    message = parser.finish()
    assert (message.reasoning or "") == reasoning.strip()
    assert (message.content or "") == content.strip()
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls
    assert message.incomplete_calls == []


class CountingPattern:
    """A compiled pattern that counts the characters it scans."""

    def __init__(self, pattern: re.Pattern) -> None:
        self.pattern, self.scanned = pattern, 0

    def _count(self, match: re.Match | None, text: str, start: int, end: int) -> re.Match | None:
        self.scanned += 1 + (match.end() if match else min(end, len(text))) - start
        return match

    def search(self, text: str, start: int) -> re.Match | None:
        return self._count(self.pattern.search(text, start), text, start, len(text))

    def match(self, text: str, start: int, end: int) -> re.Match | None:
        return self._count(self.pattern.match(text, start, end), text, start, end)


MEGABYTE = 1_000_000
ADVERSARIAL = {
    "text": "hello ",
    "spaces": " ",
    "brackets": "<",
    "half tags": "</tool_cal",
    "stray tags": "<tool_call>",
    "stray tags and names": "<tool_call>get_weather",
    "almost names": "<tool_call>" + " " * 400 + "<",
    "too long names": "<tool_call>" + "x" * 600,
    "thinking": "<think></think>",
    "calls": f"<tool_call>get_weather{PAIR}</tool_call>",
    "keys": "<arg_key>" * 3,
    "open value": f"<tool_call>get_weather{PAIR[:-17]}",
    "open typed value": "<tool_call>search<arg_key>filters</arg_key><arg_value>[",
    "open key": "<tool_call>get_weather<arg_key>k ",
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("piece", [MEGABYTE, 64])
def test_work_is_linear_in_the_length(kind, piece, monkeypatch):
    unit = ADVERSARIAL[kind]
    text = unit * (MEGABYTE // len(unit))
    if kind.startswith("open"):
        text = unit + "[" * MEGABYTE
    name_pattern = CountingPattern(output_parser._NAME)
    monkeypatch.setattr(output_parser, "_NAME", name_pattern)
    parser = OutputParser(TOOLS)
    patterns = {pattern: CountingPattern(pattern) for pattern in set(parser._search.values())}
    parser._search = {state: patterns[pattern] for state, pattern in parser._search.items()}
    buffered = 0
    for at in range(0, len(text), piece):
        parser.feed(text[at : at + piece])
        buffered = max(buffered, len(parser._text))
    parser.finish("length")
    assert buffered <= 512 + len("</tool_call>")
    scanned = name_pattern.scanned + sum(pattern.scanned for pattern in patterns.values())
    assert scanned <= 12 * len(text)
