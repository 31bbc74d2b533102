"""Chat: the rendered prompt, the parts of an answer, and streams whose deltas join to the same answer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from glm_jax.errors import PromptError, SamplingError
from glm_jax.llm import LLM
from glm_jax.sampling import SamplingParams
from glm_jax.text import Delta, render_chat
from tests.builders.llm_checkpoints import write_scripted_model
from tests.text.fixtures import TIME_TOOL, WEATHER_TOOL

GREEDY = SamplingParams(temperature=0, max_tokens=30, seed=0)
HELLO = [{"role": "user", "content": "hi"}]
CALL = ["<tool_call>", "get_", "weather", "<arg_key>", "city</arg_key><arg_value>Ber", "lin", "</arg_value>"]
SCRIPTS = {
    "<think>": ["Let me", " see.\n", "</think>", "It is ", "0xE2", "0x82", "0xAC", " 5.", *CALL, "</tool_call>"],
    "[MASK]": ["Hel", "lo, ", "wor", "ld"],
}
# The official template is longer: its description of tools would fill the context.
TEMPLATE = "{% if tools %}{{ tools | length }}{% endif %}{{ messages[-1].content }}{{ suffix }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("chat"), SCRIPTS)


@pytest.fixture(scope="module")
def writer(folder: Path) -> LLM:
    """Thinks and calls tools after a prompt that ends with <think>; has no chat template of its own."""
    return LLM.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write_scripted_model(tmp_path_factory.mktemp("templated"), SCRIPTS)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return LLM.load(folder, dtype="float32")


def joined(deltas: Iterable[Delta]) -> tuple[str | None, str | None, list[tuple[str | None, str]]]:
    """Reasoning, content and calls of a stream."""
    reasoning, content, names, arguments = "", "", {}, {}
    for delta in deltas:
        reasoning += delta.reasoning
        content += delta.content
        if call := delta.tool_call:
            names.setdefault(call.index, call.name)
            arguments[call.index] = arguments.get(call.index, "") + call.arguments
    return reasoning or None, content or None, [(names[i], arguments[i]) for i in sorted(names)]


def test_the_prompt_is_the_rendered_conversation(writer):
    conversation = [{"role": "system", "content": "x"}, *HELLO]
    answer = writer.chat(conversation, GREEDY)
    assert answer.prompt_tokens == len(writer.tokenizer.encode(render_chat(conversation)))
    assert answer.token_ids == writer.generate(render_chat(conversation), GREEDY).token_ids


def test_an_answer_without_tools_keeps_their_tags_as_text(writer):
    answer = writer.chat(HELLO, GREEDY)
    assert answer.reasoning == "Let me see."
    assert answer.content == "It is € 5." + "".join(CALL) + "</tool_call>"
    assert (answer.tool_calls, answer.finish_reason) == ([], "stop")
    assert answer.completion_tokens == len(SCRIPTS["<think>"]) + 1


def test_tool_calls(templated):
    answer = templated.chat(HELLO, GREEDY, tools=[WEATHER_TOOL, TIME_TOOL], suffix="<think>")
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("Let me see.", "It is € 5.", "tool_calls")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("get_weather", {"city": "Berlin"})]
    assert answer.prompt_tokens == len(templated.tokenizer.encode("2hi<think>"))
    assert answer.text.endswith("</tool_call>")


@pytest.mark.parametrize(
    ("choice", "called", "reason"),
    [
        ("none", [], "stop"),
        ({"type": "function", "function": {"name": "get_weather"}}, ["get_weather"], "stop"),
        ({"type": "function", "function": {"name": "get_time"}}, [], "stop"),
    ],
    ids=str,
)
def test_tool_choice(templated: LLM, choice: Any, called: list[str], reason: str) -> None:
    answer = templated.chat(HELLO, GREEDY, tools=[WEATHER_TOOL, TIME_TOOL], tool_choice=choice, suffix="<think>")
    assert ([call.name for call in answer.tool_calls], answer.finish_reason) == (called, reason)
    assert answer.content.strip() == "It is € 5."


def test_a_call_that_is_cut_off_is_no_call(templated):
    answer = templated.chat(HELLO, GREEDY, tools=[WEATHER_TOOL], suffix="<think>", max_tokens=14)
    assert (answer.tool_calls, answer.finish_reason) == ([], "length")
    assert [call.name for call in answer.message.incomplete_calls] == ["get_weather"]


def test_thinking_can_be_switched_off(writer):
    """The prompt ends with </think>, after which the script continues with the answer."""
    answer = writer.chat(HELLO, GREEDY, enable_thinking=False)
    assert answer.reasoning is None
    assert answer.content.startswith("It is € 5.")


def test_the_checkpoints_own_template_and_its_switches_are_used(templated):
    answer = templated.chat(HELLO, GREEDY, suffix="[MASK]")
    assert (answer.content, answer.reasoning) == ("Hello, world", None)
    assert answer.prompt_tokens == len(templated.tokenizer.encode("hi[MASK]"))
    with pytest.raises(PromptError, match="enable_thinking"):
        templated.chat(HELLO, GREEDY, enable_thinking=True)


@pytest.mark.parametrize(
    "options",
    [
        {"suffix": "<think>"},
        {"suffix": "<think>", "tools": [WEATHER_TOOL, TIME_TOOL]},
        {"suffix": "<think>", "tools": [WEATHER_TOOL, TIME_TOOL], "tool_choice": "none"},
        {"suffix": "<think>", "tools": [WEATHER_TOOL], "max_tokens": 14},
        {"suffix": "<think>", "max_tokens": 2},
        {"suffix": "[MASK]"},
        {"suffix": "[MASK]", "stop": "o, w"},
    ],
    ids=str,
)
def test_the_deltas_of_a_stream_are_the_answer(templated: LLM, options: dict[str, Any]) -> None:
    whole = templated.chat(HELLO, GREEDY, **options)
    stream = templated.chat(HELLO, GREEDY, stream=True, **options)
    assert stream.completion is None
    deltas = list(stream)
    reasoning, content, calls = joined(deltas)
    assert (reasoning, content) == (whole.reasoning, whole.content)
    expected = [*whole.tool_calls, *whole.message.incomplete_calls]
    assert calls == [(call.name, call.arguments_json) for call in expected]
    assert stream.completion == whole
    assert len(deltas) > 1


def test_n_answers(writer):
    answers = writer.chat(HELLO, GREEDY, n=4)
    assert [a.seed for a in answers] == [0, 1, 2, 3]
    assert [a.content for a in answers] == [writer.chat(HELLO, GREEDY).content] * 4


def test_an_answer_and_a_result_go_back_into_the_conversation(templated):
    first = templated.chat(HELLO, GREEDY, tools=[WEATHER_TOOL], suffix="<think>")
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "[MASK]"}
    second = templated.chat([*HELLO, first.message.as_turn(), result], GREEDY, suffix="")
    assert second.content == "Hello, world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("messages", "options", "error", "message"),
    [
        ([], {}, PromptError, "message"),
        ([{"content": "hi"}], {}, PromptError, "role"),
        ("hi", {}, PromptError, "messages"),
        (HELLO, {"tool_choice": "required", "tools": [TIME_TOOL]}, PromptError, '"required" cannot be promised'),
        (HELLO, {"tool_choice": "sometimes", "tools": [TIME_TOOL]}, PromptError, "tool_choice must be"),
        (HELLO, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, PromptError, "not among the tools"),
        (HELLO, {"tools": [{"type": "function"}]}, PromptError, "no function name"),
        (HELLO, {"temprature": 0}, PromptError, "unknown switch 'temprature'"),
        (HELLO, {"template": "x"}, PromptError, "template is not a switch of the chat template"),
        (HELLO, {"add_generation_prompt": False}, PromptError, "add_generation_prompt is not a switch"),
        (HELLO, {"enable_thinking": "no"}, PromptError, "must be true or false"),
        (HELLO, {"temperature": -1}, SamplingError, "temperature"),
        ([{"role": "user", "content": "x" * 1000}], {}, PromptError, "at most 999 fit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_raised_before_anything_runs(writer, messages, options, error, message, stream):
    """A stream raises when it is created, not when its first chunk is read."""
    with pytest.raises(error) as caught:
        writer.chat(messages, stream=stream, **options)
    assert message in str(caught.value)


def test_a_stream_has_one_answer(writer):
    with pytest.raises(SamplingError, match="n must be 1"):
        writer.chat(HELLO, n=2, stream=True)
