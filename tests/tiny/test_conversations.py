"""Conversations: the model's own format, reproducible, and without held-out instances."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert.calibrate
from convert.calibrate.calibration_data import _STDLIB_FILES
from examples.tiny_recipe.conversations import sample_conversation
from examples.tiny_recipe.corpus import LibraryFile
from examples.tiny_recipe.held_out_tasks import (
    evaluation_conversations,
    large_evaluation_conversations,
    score_answer,
    to_record,
)
from examples.tiny_recipe.tasks import KINDS, is_held_out
from examples.tiny_recipe.tools import SCHEMAS, TOOL_TASK_SAMPLERS, sample_tool_task
from glm_jax.text import parse_output, render_chat

SUM = re.compile(r"(?:What is|Add|Compute) (\d+) (?:\+|and) (\d)[.?]")
seeds = st.integers(0, 2**32)
DIGEST = """
import hashlib; from random import Random
from examples.tiny_recipe.conversations import sample_conversation
from glm_jax.text import render_chat
rng = Random(7)
print(hashlib.sha256("".join(sample_conversation(rng).text(render_chat) for _ in range(50)).encode()).hexdigest())
"""


def split_answer(conversation):
    prompt, whole = conversation.prompt(render_chat), conversation.text(render_chat)
    assert whole.startswith(prompt)
    assert whole.endswith(conversation.end)
    return whole[len(prompt) : -len(conversation.end)], conversation.end


@given(seed=seeds)
def test_the_answer_continues_the_prompt_and_is_scored_correct(seed):
    conversation = sample_conversation(Random(seed))
    text, end = split_answer(conversation)
    score = score_answer(to_record(conversation), text, end)
    assert score.is_correct
    assert score.is_well_formed


@given(seed=seeds, cut=st.integers(1, 20))
def test_a_damaged_answer_is_not_correct(seed, cut):
    conversation = sample_conversation(Random(seed))
    text, end = split_answer(conversation)
    record = to_record(conversation)
    assert not score_answer(record, text, None).is_correct
    assert not score_answer(record, text + "x", end).is_correct
    assert not score_answer(record, text[: len(text) - min(cut, len(record["answer"]) or len(text))], end).is_correct


@pytest.mark.parametrize("name", sorted(TOOL_TASK_SAMPLERS))
@given(seed=seeds)
def test_calls_fit_their_schema(name, seed):
    task = TOOL_TASK_SAMPLERS[name](Random(seed))
    message = parse_output(task.call_text, tools=[SCHEMAS[name]], thinking=False)
    assert [(call.name, call.arguments) for call in message.tool_calls] == [(task.name, task.arguments)]
    properties = SCHEMAS[name]["function"]["parameters"]["properties"]
    kinds = {"string": str, "integer": int}
    assert {key: type(value) for key, value in task.arguments.items()} == {
        k: kinds[v["type"]] for k, v in properties.items()
    }


@pytest.mark.parametrize("name", sorted(set(TOOL_TASK_SAMPLERS) - {"list_files"}))
def test_no_call_is_both_trained_on_and_held_out(name):
    rng = Random(name)
    held_out = {str(sample_tool_task(rng, [name], held_out=True).arguments) for _ in range(30)}
    trained = {str(sample_tool_task(rng, [name], held_out=False).arguments) for _ in range(300)}
    assert not held_out & trained


def test_a_call_without_arguments_is_never_held_out():
    assert not sample_tool_task(Random(0), ["list_files"], held_out=False).held_out
    with pytest.raises(ValueError, match="list_files"):
        sample_tool_task(Random(0), ["list_files"], held_out=True)


def test_held_out_conversations_are_always_the_same():
    first, second = evaluation_conversations(), evaluation_conversations()
    assert first == second
    assert len(first) >= 500
    assert {item.thinking for item in first} == {True, False}


def test_another_process_samples_the_same_bytes():
    rng = Random(7)
    text = "".join(sample_conversation(rng).text(render_chat) for _ in range(50))
    digest = hashlib.sha256(text.encode()).hexdigest()
    child = subprocess.run(
        [sys.executable, "-c", DIGEST],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "5", "PYTHONPATH": "."},
    )
    assert child.stdout.strip() == digest


def test_the_larger_set_is_new_to_training_and_calibration(tiny_folder):
    items = large_evaluation_conversations()
    assert len(items) > 1000
    assert len({str((item.messages[:-1], item.tools, item.thinking)) for item in items}) == len(items)
    assert {item.kind for item in items} == {*KINDS, "tool_call"}
    sums = {match.groups() for item in items if (match := SUM.search(item.messages[0]["content"]))}
    assert len(sums) > 20
    assert all(is_held_out(f"add|{a} {b}") for a, b in sums)
    calibration = Path(convert.calibrate.__file__).with_name("conversations.jsonl").read_text(encoding="utf-8")
    trained = set(SUM.findall(calibration))
    assert len(trained) > 5
    assert not trained & sums
    assert not [item for item in items if json.dumps(f"<|user|>{item.messages[0]['content']}<")[1:-1] in calibration]


def test_calibration_reads_no_held_out_file():
    assert not [name for name in _STDLIB_FILES if LibraryFile(name, "", "").held_out]
