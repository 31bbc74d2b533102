"""Chat tasks with one correct answer each, and the scoring of a model's answers."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from glm_jax.cli.common import read_prompt_text
from glm_jax.errors import GlmError, PromptError
from glm_jax.text import parse_output


class ChatTask(TypedDict):
    """One line of a file of tasks.

    Attributes:
        kind: Group of the task in reports.
        messages: Messages to send.
        tools: Tools to offer; may be empty.
        thinking: Whether thinking is on.
        answer: The correct answer, if no tool call is required.
        calls: The correct tool calls; may be empty.
    """

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    answer: str
    calls: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class TaskScore:
    """Score of one answer.

    Attributes:
        kind: Group of the task in reports.
        thinking: Whether thinking was on.
        is_correct: Whether the answer is exactly correct.
        is_well_formed: Whether the tool call is well formed; true if none is required.
    """

    kind: str
    thinking: bool
    is_correct: bool
    is_well_formed: bool


def read_chat_tasks(path: Path) -> list[ChatTask]:
    """Reads a file of tasks, one JSON object per line.

    Raises:
        PromptError: if the file cannot be read, or a line is not a task.
    """
    lines = read_prompt_text(str(path)).split("\n")  # splitlines would also split at separators inside JSON strings
    tasks = [_parse_task(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise PromptError(f"{path} holds no task")
    return tasks


def _parse_task(line: str, where: str) -> ChatTask:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    types = {"kind": str, "messages": list, "tools": list, "thinking": bool, "answer": str, "calls": list}
    if not isinstance(record, dict) or set(record) != set(types):
        raise PromptError(f"{where}: a task is a JSON object with {', '.join(types)}")
    wrong = [name for name, kind in types.items() if not isinstance(record[name], kind)]
    if wrong:
        raise PromptError(f"{where}: {wrong[0]} must be a {types[wrong[0]].__name__}")
    return cast(ChatTask, record)


def score_answer(task: ChatTask, text: str, stop_token: str | None) -> TaskScore:
    """Scores an answer.

    Args:
        task: The task.
        text: Text that the model generated, without the token that ended it.
        stop_token: The token that ended the answer; ``None`` if the model did not stop.
    """
    try:
        message = parse_output(text, tools=task["tools"] or None, thinking=task["thinking"])
    except GlmError:
        return TaskScore(task["kind"], task["thinking"], is_correct=False, is_well_formed=False)
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    content = message.content or ""
    if task["calls"]:
        well_formed = stop_token == "<|observation|>" and len(calls) == 1 and _matches_schema(calls[0], task["tools"])
        correct = well_formed and calls == task["calls"] and not content
        return TaskScore(task["kind"], task["thinking"], correct, well_formed)
    correct = stop_token == "<|user|>" and content == task["answer"] and not calls
    return TaskScore(task["kind"], task["thinking"], correct, is_well_formed=True)


def _matches_schema(call: dict[str, Any], tools: Sequence[dict[str, Any]]) -> bool:
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    if call["name"] not in schemas:
        return False
    schema, arguments = schemas[call["name"]], set(call["arguments"])
    return set(schema.get("required", ())) <= arguments <= set(schema.get("properties", ()))


def summarize_scores(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """Returns the shares of correct answers (in all, by kind, by thinking) and of well-formed tool calls."""
    by_kind, by_thinking = defaultdict(list), defaultdict(list)
    for score in scores:
        by_kind[score.kind].append(score.is_correct)
        by_thinking["on" if score.thinking else "off"].append(score.is_correct)
    calls = [score.is_well_formed for score in scores if score.kind == "tool_call"]
    return {
        "tasks": len(scores),
        "exact_match": _share([score.is_correct for score in scores]),
        "by_kind": {kind: _share(flags) for kind, flags in sorted(by_kind.items())},
        "by_thinking": {state: _share(flags) for state, flags in sorted(by_thinking.items())},
        "well_formed_calls": _share(calls),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None
