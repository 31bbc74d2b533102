"""Parsing of answers: the grammar, and bugs that users reported for other parsers."""

import json

import pytest

from glm_jax.errors import PromptError
from glm_jax.text import OutputParser, opens_thinking, parse_output, render_chat
from tests.text.fixtures import TOOLS, WEATHER_TOOL, make_tool


def pairs(**arguments) -> str:
    return "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items())


def call(name: str, **arguments) -> str:
    return f"<tool_call>{name}{pairs(**arguments)}</tool_call>"


def parsed_calls(message) -> list[tuple]:
    return [(call.name, call.arguments) for call in message.tool_calls]


PARIS = call("get_weather", city="Paris")


# The parts of an answer


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("R</think>A", "R", "A"),
        ("R \n</think>A", "R", "A"),
        ("\n R</think>A", "\n R", "A"),
        ("</think>A", None, "A"),
        (" \n</think>A", None, "A"),
        ("R</think>", "R", None),
        ("R", "R", None),
        ("R \n", "R", None),
        ("", None, None),
        ("<think>R</think>A", "R", "A"),
        ("R</think>A</think>B", "R", "AB"),
        ("R</think>A<think>Q</think>B", "RQ", "AB"),
        ("R \n</think>A<think>Q \n</think>B", "R \nQ", "AB"),
        ("R</think></think></think>A", "R", "A"),
        ("R</think >A", "R</think >A", None),
        ("a < b </thin", "a < b </thin", None),
        ("R</think>a <b> </tool_call> <arg_key>", "R", "a <b> </tool_call> <arg_key>"),
        ("R</think>\n\n  A \n", "R", "\n\n  A \n"),
    ],
)
def test_reasoning_and_content(text, reasoning, content):
    message = parse_output(text)
    assert (message.reasoning, message.content) == (reasoning, content)
    assert message.tool_calls == message.incomplete_calls == []
    assert message.finish_reason == "stop"


@pytest.mark.parametrize("text", ["A", "</think>A", "<think>R</think>A", "A<think>B", " \n", " A\n", "a</thi"])
def test_without_thinking_its_tags_are_text(text):
    message = parse_output(text, thinking=False)
    assert (message.reasoning, message.content) == (None, text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"</think>\n\n{PARIS}", None),
        (f"</think>\nLook.\n{PARIS}", "Look."),
        (f"</think>\nLook.\n{PARIS} \n", "Look."),
        (f"</think>{PARIS}\n\nDone.\n", "Done."),
        (f"</think>One.\n{PARIS}\nTwo.{PARIS}Three.", "One.\n\nTwo.Three."),
    ],
)
def test_white_space_next_to_calls_goes_and_text_after_them_stays(text, content):
    message = parse_output(text, tools=TOOLS)
    assert message.content == content
    assert message.finish_reason == "tool_calls"
    assert set(map(str, parsed_calls(message))) == {str(("get_weather", {"city": "Paris"}))}


def test_without_calls_white_space_at_the_end_stays():
    assert parse_output("</think>\nA\n", tools=TOOLS).content == "A\n"
    assert parse_output("</think> \n", tools=TOOLS).content is None
    assert parse_output("</think>\nA\n", tools=TOOLS, tool_choice="none").content == "\nA\n"


# Calls


def test_arguments_are_typed_by_the_schema():
    text = call("get_weather", city="75001", days=" 3", exact="true") + call(
        "search", query="1", limit="null", other="5"
    )
    message = parse_output(text, tools=TOOLS, thinking=False)
    assert parsed_calls(message) == [
        ("get_weather", {"city": "75001", "days": 3, "exact": True}),
        ("search", {"query": "1", "limit": None, "other": "5"}),
    ]
    assert [json.loads(call.arguments_json) for call in message.tool_calls] == [c.arguments for c in message.tool_calls]
    assert len({call.id for call in message.tool_calls}) == 2
    assert all(call.complete and call.id.startswith("call_") for call in message.tool_calls)


def test_the_json_is_that_of_the_arguments():
    text = call("search", query='a "b" \\ \n é 🙂', filters='{"x":[1,{}]}', limit="7")
    (parsed,) = parse_output(text, tools=TOOLS, thinking=False).tool_calls
    assert parsed.arguments_json == json.dumps(parsed.arguments, ensure_ascii=False)


def test_without_tools_every_call_is_taken_with_strings():
    message = parse_output(call("anything", a="1"), thinking=False)
    assert parsed_calls(message) == [("anything", {"a": "1"})]
    assert parsed_calls(parse_output(call("anything", a="1"), tools=[], thinking=False)) == parsed_calls(message)


def test_white_space_between_the_parts_of_a_call_means_nothing():
    text = "<tool_call> \n get_weather\n<arg_key> city\n</arg_key> \n <arg_value> a\n b </arg_value>\n\n</tool_call>"
    assert parsed_calls(parse_output(text, tools=TOOLS, thinking=False)) == [("get_weather", {"city": " a\n b "})]


def test_a_value_is_kept_as_it_is():
    value = "\n <tool_call>get_time</tool_call><arg_key>x</arg_key><arg_value></tool_call> </arg_valu </think>\t"
    message = parse_output(call("get_weather", city=value), tools=TOOLS)
    assert parsed_calls(message) == [("get_weather", {"city": value})]
    assert (message.reasoning, message.content) == (None, None)


def test_the_last_of_equal_keys_counts():
    text = f"<tool_call>get_weather{pairs(city='A', days='1')}{pairs(city='B')}</tool_call>"
    (parsed,) = parse_output(text, tools=TOOLS, thinking=False).tool_calls
    assert parsed.arguments == json.loads(parsed.arguments_json) == {"city": "B", "days": 1}


def test_a_call_to_an_unknown_tool_is_left_out():
    text = f"R</think>A{call('no_such_tool', city='</tool_call>')}B{PARIS}{call('get_weather_', city='x')}"
    message = parse_output(text, tools=TOOLS)
    assert parsed_calls(message) == [("get_weather", {"city": "Paris"})]
    assert message.content == "AB"
    assert message.incomplete_calls == []


def test_only_unknown_calls_is_an_ordinary_answer():
    message = parse_output(f"A {call('no_such_tool')}", tools=TOOLS, thinking=False)
    assert (message.content, message.tool_calls, message.finish_reason) == ("A ", [], "stop")


@pytest.mark.parametrize(
    "text", ["<tool_call></tool_call>", "<tool_call> \n</tool_call>", "<tool_call><arg_key>a</tool_call>"]
)
def test_a_call_without_a_name_is_left_out(text):
    message = parse_output(f"A{text}B", thinking=False)
    assert (message.content, message.tool_calls, message.incomplete_calls) == ("AB", [], [])


STRAY = [
    "use the <tool_call> tag to do it",
    "<tool_call>{'name': 'get_weather', 'arguments': {}}</tool_call>",
    "<tool_call>get_weather is it</tool_call>",
    "<tool_call>a<b",
    "<tool_call>no_such_tool",
    "<tool_call>get_weather_tomorrow",
    "<tool_call>" + "x" * 600 + "</tool_call>",
    "<tool_call>" + " " * 600 + "get_time</tool_call>",
]


@pytest.mark.parametrize("text", STRAY)
def test_a_tag_that_no_name_follows_is_text(text):
    for tools in (TOOLS, [WEATHER_TOOL]):
        assert parse_output(f"A {text}", tools=tools, thinking=False).content == f"A {text}"
        message = parse_output(f"R {text}", tools=tools)
        assert (message.reasoning, message.content) == (f"R {text}", None)
        assert message.tool_calls == message.incomplete_calls == []


def test_thinking_ends_as_usual_after_a_stray_tag():
    message = parse_output(f"a <tool_call> is</think>B{PARIS}", tools=TOOLS)
    assert (message.reasoning, message.content) == ("a <tool_call> is", "B")
    assert len(message.tool_calls) == 1


def test_a_doubled_tag_begins_one_call():
    message = parse_output(f"text <tool_call><tool_call>{PARIS}", tools=TOOLS, thinking=False)
    assert parsed_calls(message) == [("get_weather", {"city": "Paris"})]
    assert message.content == "text <tool_call><tool_call>"


# Calls that are cut off or malformed


CUT = [
    ("", ""),
    ("get_wea", ""),
    ("get_weather", ""),
    ("get_weather\n", ""),
    ("get_weather</tool_cal", ""),
    ("get_weather<arg_key>ci", ""),
    ("get_weather<arg_key>city</arg_key>", ""),
    ("get_weather<arg_key>city</arg_key>\n<arg_val", ""),
    ("get_weather<arg_key>city</arg_key><arg_value>", '{"city": "'),
    ("get_weather<arg_key>city</arg_key><arg_value>Pa", '{"city": "Pa'),
    ("get_weather<arg_key>days</arg_key><arg_value>1", '{"days": '),
    (f"get_weather{pairs(city='Paris')}", '{"city": "Paris"'),
    (f"get_weather{pairs(city='Paris')}</tool_call", '{"city": "Paris"'),
]


@pytest.mark.parametrize(("text", "arguments_json"), CUT)
@pytest.mark.parametrize("reason", ["length", "stop", "abort"])
def test_a_cut_call_is_incomplete_and_never_invented(text, arguments_json, reason):
    message = parse_output(f"A\n<tool_call>{text}", tools=TOOLS, thinking=False, finish_reason=reason)
    assert message.tool_calls == []
    (parsed,) = message.incomplete_calls
    assert not parsed.complete
    assert "get_weather".startswith(parsed.name)
    assert parsed.arguments_json == arguments_json
    assert parsed.arguments == ({"city": "Paris"} if "Paris" in arguments_json else {})
    assert message.finish_reason == reason
    assert "<" not in message.content


def test_a_cut_call_after_a_whole_one():
    message = parse_output(PARIS + PARIS[:-15], tools=TOOLS, thinking=False, finish_reason="length")
    assert parsed_calls(message) == [("get_weather", {"city": "Paris"})]
    assert [call.name for call in message.incomplete_calls] == ["get_weather"]
    assert message.finish_reason == "length"


@pytest.mark.parametrize(
    "body",
    [
        "<arg_key>city</arg_key>",
        "<arg_key>city",
        f"<arg_key>days</arg_key>{pairs(city='Paris')}",
        f"{pairs(city='Paris')}<arg_value>Paris</arg_value>",
        "<arg_key>city<arg_value>Paris</arg_value>",
    ],
)
def test_a_key_without_a_value_makes_a_call_incomplete(body):
    message = parse_output(f"<tool_call>get_weather{body}</tool_call>B", tools=TOOLS, thinking=False)
    assert message.tool_calls == []
    assert [call.name for call in message.incomplete_calls] == ["get_weather"]
    assert (message.content, message.finish_reason) == ("B", "stop")


def test_a_call_that_is_never_closed_ends_where_the_next_begins():
    message = parse_output(f"<tool_call>get_weather{pairs(city='A')}{PARIS}", tools=TOOLS, thinking=False)
    assert parsed_calls(message) == [("get_weather", {"city": "Paris"})]
    assert [call.arguments for call in message.incomplete_calls] == [{"city": "A"}]


# tool_choice and finish_reason


def test_tool_choice_none_leaves_calls_out():
    message = parse_output(f"R</think>A{PARIS}B{PARIS[:20]}", tools=TOOLS, tool_choice="none")
    assert (message.reasoning, message.content) == ("R", "AB")
    assert (message.tool_calls, message.incomplete_calls, message.finish_reason) == ([], [], "stop")


def test_tool_choice_none_without_tools_shows_the_text():
    message = parse_output(f"R {PARIS}</think>\nA {PARIS}\n", tool_choice="none")
    assert (message.reasoning, message.content) == (f"R {PARIS}", f"\nA {PARIS}\n")


def test_finish_reasons():
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, reason in (("auto", "tool_calls"), ("required", "tool_calls"), (named, "stop"), ("none", "stop")):
        options = {"tools": TOOLS, "tool_choice": choice, "thinking": False}
        assert parse_output(PARIS, **options).finish_reason == reason
        assert parse_output(PARIS, **options, finish_reason="length").finish_reason == "length"
        assert parse_output(PARIS, **options, finish_reason="abort").finish_reason == "abort"
        assert parse_output("A", **options).finish_reason == "stop"


def test_a_named_tool_is_the_only_one():
    named = {"type": "function", "function": {"name": "get_weather"}}
    message = parse_output(
        call("get_time") + PARIS + "<tool_call>get_t", tools=TOOLS, tool_choice=named, thinking=False
    )
    assert parsed_calls(message) == [("get_weather", {"city": "Paris"})]
    assert (message.content, message.incomplete_calls) == (None, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, 'tool_choice "required" needs tools'),
        ({"tool_choice": "any", "tools": TOOLS}, 'tool_choice must be "auto", "none", "required" or'),
        ({"tool_choice": {"name": "get_time"}, "tools": TOOLS}, "tool_choice must be"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": TOOLS},
            "'f', which is not among the",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "not among the tools: none"),
        ({"tools": "get_time"}, "tools must be a list"),
        ({"finish_reason": "tool_calls"}, 'must be "stop", "length" or "abort"'),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(PromptError, match=message):
        parse_output("A", **options)


def test_feed_after_flush_is_an_error():
    parser = OutputParser()
    parser.feed("R</think>A ")
    assert [delta.content for delta in parser.flush()] == [" "]
    assert parser.flush() == []
    assert parser.finish().content == parser.finish().content == "A "
    with pytest.raises(RuntimeError, match="has ended"):
        parser.feed("B")


# Bugs that users reported for other parsers (vLLM, SGLang, llama.cpp, Ollama, MLX)


def stream(text: str, size: int, **options) -> tuple[OutputParser, list]:
    parser = OutputParser(**options)
    deltas = [delta for at in range(0, len(text), size) for delta in parser.feed(text[at : at + size])]
    return parser, deltas + parser.flush()


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("text", [call("get_time"), "<tool_call>get_time\n</tool_call>", "A" + call("get_time")])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_call_without_arguments(text, size, thinking):
    """Elsewhere: no call, or invalid arguments, when streamed (vLLM 44326, 42400, 46040, 39757; llama.cpp 20650)."""
    parser, deltas = stream(text, size, tools=TOOLS, thinking=thinking)
    assert parsed_calls(parser.finish()) == [("get_time", {})]
    pieces = [delta.tool_call for delta in deltas if delta.tool_call]
    assert "".join(piece.arguments for piece in pieces) == "{}"
    assert [piece.name for piece in pieces if piece.name] == ["get_time"]


@pytest.mark.parametrize("size", range(1, 60))
def test_several_tokens_in_one_piece(size):
    """Elsewhere: lost or mangled argument pieces with speculative decoding or a stream interval (vLLM 34449, 39253)."""
    text = "R</think>A" + call("get_weather", city='Pa"r\nis', days="3") + call("get_time") + PARIS
    parser, deltas = stream(text, size, tools=TOOLS)
    message = parser.finish()
    assert parsed_calls(message) == [
        ("get_weather", {"city": 'Pa"r\nis', "days": 3}),
        ("get_time", {}),
        ("get_weather", {"city": "Paris"}),
    ]
    for index, parsed in enumerate(message.tool_calls):
        pieces = [delta.tool_call for delta in deltas if delta.tool_call and delta.tool_call.index == index]
        assert (pieces[0].id, pieces[0].name) == (parsed.id, parsed.name)
        assert json.loads("".join(piece.arguments for piece in pieces)) == parsed.arguments


def test_long_strings_stream_while_they_are_open():
    """Elsewhere: held back until the value was closed (vLLM 32829)."""
    parser = OutputParser([WEATHER_TOOL], thinking=False)
    parser.feed("<tool_call>get_weather<arg_key>city</arg_key><arg_value>")
    for word in ("one ", 'two "', "\\\n", "🙂 "):
        (delta,) = parser.feed(word)
        assert delta.tool_call.arguments == json.dumps(word, ensure_ascii=False)[1:-1]
    assert parser.feed("a </arg_val")[0].tool_call.arguments == "a "
    assert parser.feed("x")[0].tool_call.arguments == "</arg_valx"


@pytest.mark.parametrize(
    "schema", [{"type": "integer"}, {"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "object"}]}]
)
def test_what_may_not_be_a_string_waits_until_it_is_closed(schema):
    parser = OutputParser([make_tool("f", a=schema)], thinking=False)
    assert parser.feed("<tool_call>f<arg_key>a</arg_key><arg_value>1")[-1].tool_call.arguments == '{"a": '
    assert parser.feed("23") == []
    value = "123" if "integer" in str(schema) else '"123"'
    if "object" not in str(schema):
        assert parser.feed("</arg_value>")[0].tool_call.arguments == value


def test_an_earlier_turns_thinking_is_not_this_turns():
    """Elsewhere: a ``</think>`` of an earlier message turned reasoning into content (vLLM 27703, 36833)."""
    earlier = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "c"},
        {"role": "user", "content": "</think>"},
    ]
    prompt = render_chat(earlier)
    message = parse_output("R</think>A", thinking=opens_thinking(prompt))
    assert (message.reasoning, message.content) == ("R", "A")


def test_thinking_that_opens_again_is_reasoning():
    """Elsewhere: shown as content (llama.cpp 19613)."""
    message = parse_output("R</think><think>more</think>A")
    assert (message.reasoning, message.content) == ("Rmore", "A")


def test_a_call_ends_thinking_that_was_left_open():
    """Elsewhere: reasoning and call were mixed up (vllm-mlx 246, ollama 13840)."""
    message = parse_output(f"I should look.\n{PARIS}", tools=TOOLS)
    assert (message.reasoning, message.content) == ("I should look.", None)
    assert parsed_calls(message) == [("get_weather", {"city": "Paris"})]
    after = parse_output(f"R{PARIS}A</think>B", tools=TOOLS)
    assert (after.reasoning, after.content) == ("R", "AB")


def test_an_answer_without_thinking_is_content():
    """Elsewhere: the whole answer was reasoning and content was null (vLLM 0.16)."""
    prompt = render_chat([{"role": "user", "content": "hi"}], enable_thinking=False)
    message = parse_output("Hello!", thinking=opens_thinking(prompt))
    assert (message.reasoning, message.content) == (None, "Hello!")


def test_text_that_looks_like_a_special_token_stays():
    """Elsewhere: deleted from the answer (vLLM without streaming)."""
    text = "say <|user|>, [MASK] or <|endoftext|> [gMASK]<sop>"
    message = parse_output(f"{text}</think>{text}{call('get_weather', city=text)}", tools=TOOLS)
    assert (message.reasoning, message.content) == (text, text)
    assert parsed_calls(message) == [("get_weather", {"city": text})]


def test_thinking_tags_inside_an_argument_stay_there():
    """Elsewhere: moved into the reasoning (vLLM without streaming)."""
    text = "a<think>b</think>c"
    message = parse_output(f"R</think>{call('get_weather', city=text)}", tools=TOOLS)
    assert (message.reasoning, message.content) == ("R", None)
    assert parsed_calls(message) == [("get_weather", {"city": text})]


def test_a_tool_loop():
    """A model calls a tool, reads the result and answers, as with ``llm.chat`` (ollama 13840)."""
    messages = [{"role": "user", "content": "weather?"}]
    reply = parse_output(f"R1{call('get_weather', city='75001', days='2')}<|observation|>"[:-15], tools=TOOLS)
    messages += [reply.as_turn(), {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "sunny"}]
    prompt = render_chat(messages, TOOLS)
    assert prompt.endswith(
        "<|assistant|><think>R1</think>" + call("get_weather", city="75001", days="2") + "<|observation|>"
        "<tool_response>sunny</tool_response><|assistant|><think>"
    )
