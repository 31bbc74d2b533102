"""The official chat format, against expected prompts written by hand."""

import json
from types import MappingProxyType

import pytest

from glm_jax.errors import PromptError
from glm_jax.text import Message, ToolCall, is_official, opens_thinking, render_chat
from tests.text.fixtures import TIME_TOOL

START = "[gMASK]<sop>"
USER = {"role": "user", "content": "hi"}
TOOL_TEXT = """<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
%s
</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value><arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"""


def render(*messages, **options) -> str:
    """The prompt after the opening tags, without the generation prompt."""
    text = render_chat(messages, add_generation_prompt=False, **options)
    assert text.startswith(START)
    return text.removeprefix(START)


def assistant(content=None, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def call(arguments, name="f", **fields) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def test_plain():
    assert render_chat([USER]) == "[gMASK]<sop><|user|>hi<|assistant|><think>"


def test_thinking_is_on_unless_switched_off():
    assert render_chat([USER], enable_thinking=False) == "[gMASK]<sop><|user|>hi<|assistant|></think>"
    assert render_chat([USER], enable_thinking=True) == render_chat([USER], enable_thinking=None) == render_chat([USER])


def test_no_generation_prompt():
    assert render_chat([USER], add_generation_prompt=False) == "[gMASK]<sop><|user|>hi"


def test_system_and_developer_are_one_role():
    for role in ("system", "developer"):
        assert render({"role": role, "content": "S"}, USER) == "<|system|>S<|user|>hi"


def test_tools_come_first():
    declared = '{"type": "function", "function": {"name": "get_time", "description": "Does get_time.", "parameters": {"type": "object", "properties": {}, "required": []}}}'  # noqa: E501
    text = render({"role": "system", "content": "S"}, USER, tools=[TIME_TOOL])
    assert text == TOOL_TEXT % declared + "<|system|>S<|user|>hi"
    assert render(USER, tools=[]) == render(USER, tools=None) == "<|user|>hi"


def test_tools_keep_their_order_keys_and_characters():
    tools = [
        {"function": {"name": "b", "description": "天气 <é> & \"'"}, "type": "function", "extra": [1.5, None, True]},
        {"name": "a", "parameters": {"z": 1, "a": 2}},
    ]
    first = (
        '{"function": {"name": "b", "description": "天气 <é> & \\"\'"}, "type": "function", "extra": [1.5, null, true]}'
    )
    second = '{"name": "a", "parameters": {"z": 1, "a": 2}}'
    assert render(USER, tools=tools) == TOOL_TEXT % f"{first}\n{second}" + "<|user|>hi"


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]])
def test_missing_content_is_empty_text(content):
    assert render(
        USER, assistant(content), {"role": "tool", "content": content}, {"role": "user", "content": content}
    ) == ("<|user|>hi<|assistant|></think><|observation|><tool_response></tool_response><|user|>")
    assert render({"role": "user"}) == "<|user|>"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, "b", {"type": "text", "text": " c"}]
    assert render({"role": "system", "content": parts}, {"role": "user", "content": tuple(parts)}) == (
        "<|system|>a b c<|user|>a b c"
    )


def test_user_text_is_kept_as_it_is_and_answers_are_stripped():
    text = " \n x\n "
    assert render({"role": "user", "content": text}, assistant(text)) == "<|user|> \n x\n <|assistant|></think>x"


def test_text_is_never_code():
    text = "{{ 1 + 1 }}{% raw %}{# #}%s{0}"
    assert render({"role": "user", "content": text}) == f"<|user|>{text}"


def test_reasoning_after_the_last_user_message_stays():
    turn = assistant("A", reasoning_content=" R\n")
    assert render(USER, turn) == "<|user|>hi<|assistant|><think>R</think>A"
    assert render(turn) == "<|assistant|><think>R</think>A"


def test_reasoning_before_the_last_user_message_is_dropped_by_default():
    turns = [USER, assistant("A", reasoning_content="R"), USER, assistant("B", reasoning="Q")]
    cleared = "<|user|>hi<|assistant|></think>A<|user|>hi<|assistant|><think>Q</think>B"
    kept = "<|user|>hi<|assistant|><think>R</think>A<|user|>hi<|assistant|><think>Q</think>B"
    assert render(*turns) == render(*turns, clear_thinking=True) == render(*turns, clear_thinking=None) == cleared
    assert render(*turns, clear_thinking=False) == kept
    assert render(*turns, clear_thinking=False, enable_thinking=False) == kept


def test_reasoning_inside_a_tool_loop_stays():
    turns = [
        USER,
        assistant(None, reasoning="one", tool_calls=[call({"k": 1})]),
        {"role": "tool", "content": "r"},
        assistant("done", reasoning="two"),
    ]
    assert render(*turns) == (
        "<|user|>hi<|assistant|><think>one</think><tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value></tool_call>"
        "<|observation|><tool_response>r</tool_response><|assistant|><think>two</think>done"
    )


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("<think>\nR\n</think>\n\nA", "<think>R</think>A"),
        ("R</think>A", "<think>R</think>A"),
        ("<think></think>A", "</think>A"),
        ("<think>R", "</think><think>R"),
        ("A<think>R</think>B</think>C", "<think>R</think>C"),
    ],
)
def test_inline_thinking_is_split_off(content, shown):
    assert render(assistant(content)) == f"<|assistant|>{shown}"


def test_inline_thinking_is_text_if_the_message_has_a_reasoning_field():
    assert render(assistant("<think>x</think>A", reasoning="R")) == "<|assistant|><think>R</think><think>x</think>A"
    assert render(assistant("A", reasoning="")) == "<|assistant|></think>A"
    both = assistant("A", reasoning="R", reasoning_content="R")
    assert render(both) == "<|assistant|><think>R</think>A"


def test_calls_follow_content_without_separators():
    arguments = {"s": "tëxt \n", "n": 1.0, "o": {"ü": [None, True]}, "": "x"}
    turn = assistant(" Look. ", tool_calls=[call(arguments), {"name": "g", "arguments": {}}])
    assert render(turn) == (
        "<|assistant|></think>Look."
        "<tool_call>f<arg_key>s</arg_key><arg_value>tëxt \n</arg_value><arg_key>n</arg_key><arg_value>1.0</arg_value>"
        '<arg_key>o</arg_key><arg_value>{"ü": [null, true]}</arg_value><arg_key></arg_key><arg_value>x</arg_value>'
        "</tool_call><tool_call>g</tool_call>"
    )


@pytest.mark.parametrize("arguments", ['{"k": "v"}', {"k": "v"}, MappingProxyType({"k": "v"}), ' {"k":"\\u0076"}\n'])
def test_arguments_as_text_or_object(arguments):
    shown = "<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>"
    assert render(assistant(tool_calls=[call(arguments)])) == f"<|assistant|></think>{shown}"


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments(arguments):
    assert render(assistant("", tool_calls=[call(arguments)])) == "<|assistant|></think><tool_call>f</tool_call>"


def test_no_calls():
    for calls in (None, [], ()):
        assert render(assistant("A", tool_calls=calls)) == "<|assistant|></think>A"


def test_results_in_a_row_share_one_observation():
    first, second = {"role": "tool", "content": "1"}, {"role": "tool", "content": [{"type": "text", "text": "2"}]}
    both = "<|observation|><tool_response>1</tool_response><tool_response>2</tool_response>"
    assert render(first, second) == both
    assert render(first, second, USER, first) == f"{both}<|user|>hi<|observation|><tool_response>1</tool_response>"


def test_results_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render({"role": "tool", "content": parts}) == "<|observation|><tool_response>a\nb</tool_response>"
    several = [{"output": "a"}, {"output": {"é": 1}}, {"output": None}]
    assert render({"role": "tool", "content": several}) == (
        "<|observation|><tool_response>a</tool_response>"
        '<tool_response>{"é": 1}</tool_response><tool_response>null</tool_response>'
    )


def test_an_answer_can_go_back_into_the_conversation():
    calls = [ToolCall("call_1", "f", {"k": 1}, '{"k": 1}', complete=True)]
    turn = Message("R", None, calls, "tool_calls").as_turn()
    assert json.loads(json.dumps(turn)) == turn
    assert render(USER, turn, {"role": "tool", "tool_call_id": "call_1", "content": "r"}) == (
        "<|user|>hi<|assistant|><think>R</think><tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value></tool_call>"
        "<|observation|><tool_response>r</tool_response>"
    )
    assert Message(None, "A", [], "stop").as_turn() == {"role": "assistant", "content": "A"}


def test_opens_thinking():
    earlier = [USER, assistant("A</think>", reasoning="R"), USER]
    assert opens_thinking(render_chat(earlier, clear_thinking=False))
    assert not opens_thinking(render_chat(earlier, enable_thinking=False, clear_thinking=False))
    assert opens_thinking("<think>")
    assert not opens_thinking("<think></think>")
    assert not opens_thinking("")


BAD_MESSAGES = {
    "the conversation is empty": [],
    "messages must be a list": "hi",
    "messages must be a list such as": {"role": "user", "content": "hi"},
    r"messages\[0\] must be an object with role and content, not str": ["hi"],
    r"messages\[1\]: unknown role 'critic'; use one of system, developer, user, assistant, tool": [
        USER,
        {"role": "critic", "content": ""},
    ],
    "unknown role None": [{"content": "hi"}],
    r"unknown role \['user'\]": [{"role": ["user"]}],
    r"messages\[0\] \(user\): content must be a string or a list of text parts, not int": [
        {"role": "user", "content": 1}
    ],
    r"messages\[0\] \(tool\): content must be a string": [{"role": "tool", "content": {"temperature": 20}}],
    r"\(user\), content\[1\]: parts of type 'image_url' are not supported; GLM-4.7-Flash reads text only": [
        {"role": "user", "content": ["a", {"type": "image_url", "image_url": {"url": "http://x"}}]}
    ],
    r"content\[0\]: parts of type 'input_audio'": [{"role": "tool", "content": [{"type": "input_audio"}]}],
    "a text part needs a string": [{"role": "user", "content": [{"type": "text", "text": None}]}],
    "a part must be": [{"role": "user", "content": [1]}],
    "function_call is no longer supported": [assistant("", function_call={"name": "f", "arguments": "{}"})],
    "only an assistant message can have tool_calls": [{"role": "user", "content": "", "tool_calls": [call({})]}],
    "reasoning must be a string, not list": [assistant("", reasoning=["a"])],
    "reasoning and reasoning_content differ": [assistant("", reasoning="a", reasoning_content="b")],
    "tool_calls must be a list, not dict": [assistant("", tool_calls={"name": "f"})],
    r"tool_calls\[0\] must be ": [assistant("", tool_calls=["f"])],
    r"tool_calls\[0\] has no function name": [assistant("", tool_calls=[{"function": {"arguments": {}}}])],
    r"tool_calls\[0\]: id must be a string": [assistant("", tool_calls=[call({}, id=7)])],
    r"messages\[0\] \(assistant\), tool_calls\[1\]: arguments are not valid JSON: Expecting": [
        assistant("", tool_calls=[call({}), call('{"k": ')])
    ],
    "arguments are not valid JSON: .*recursion": [assistant("", tool_calls=[call("[" * 100_000)])],
    "arguments must be an object, not list": [assistant("", tool_calls=[call("[1]")])],
    "arguments must be an object, not int": [assistant("", tool_calls=[call(5)])],
    "argument names must be strings": [assistant("", tool_calls=[call({1: 2})])],
    "the argument 'k' of 'f' cannot be written as JSON": [assistant("", tool_calls=[call({"k": {1, 2}})])],
    "the argument 'x' of 'f' cannot be written as JSON": [assistant("", tool_calls=[call({"x": float("nan")})])],
    "tool_call_id must be a string": [{"role": "tool", "content": "", "tool_call_id": 5}],
}


@pytest.mark.parametrize("message", BAD_MESSAGES)
def test_a_bad_message_is_one_clear_error(message):
    with pytest.raises(PromptError, match=message) as caught:
        render_chat(BAD_MESSAGES[message])
    assert "\n" not in str(caught.value)


BAD_TOOLS = {
    "tools must be a list": {"name": "f"},
    r"tools\[0\] must be an object, not str": ["f"],
    r"tools\[0\]: only tools of type \"function\" are supported, not 'web_search'": [{"type": "web_search"}],
    r"tools\[1\] has no function name": [TIME_TOOL, {"type": "function", "function": {}}],
    r"tools\[0\] has no function name: give": [{"type": "function", "function": None}],
    "must be 1 to 256 characters without white space": [{"name": "get weather"}],
    "parameters must be a JSON schema object, not list": [{"name": "f", "parameters": []}],
    "the name 'get_time' comes twice": [TIME_TOOL, TIME_TOOL],
    r"tools\[0\] cannot be written as JSON": [{"name": "f", "parameters": {"properties": {"a": object()}}}],
}


@pytest.mark.parametrize("message", BAD_TOOLS)
def test_a_bad_tool_is_one_clear_error(message):
    with pytest.raises(PromptError, match=message):
        render_chat([USER], BAD_TOOLS[message])


def test_unknown_and_impossible_switches():
    with pytest.raises(
        PromptError, match="unknown switch 'thinking': the chat template knows enable_thinking and clear"
    ):
        render_chat([USER], thinking=False)
    with pytest.raises(PromptError, match="enable_thinking must be true or false, not 'no'"):
        render_chat([USER], enable_thinking="no")


def test_another_text_is_not_the_official_template():
    assert not is_official("")
    assert not is_official("\ud800")
