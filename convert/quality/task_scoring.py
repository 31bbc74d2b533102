"""Chat tasks with one right answer each, and the marking of a model's answers."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_jax.cli.common import read_prompt_text
from glm_jax.errors import GlmError, PromptError
from glm_jax.text import parse_output


@dataclasses.dataclass(frozen=True, slots=True)
class TaskScore:
    """One answer: whether it is right to the letter, and whether its tool call (if one was due) is well formed."""

    kind: str
    thinking: bool
    is_correct: bool
    is_well_formed: bool


def read_chat_tasks(path: Path) -> list[dict[str, Any]]:
    """The tasks of a file, one JSON object per line.

    Each has ``messages`` to send with ``tools`` and ``thinking`` on or off, the ``answer`` or the ``calls`` that are
    right, and a ``kind``, by which they are grouped.

    Raises:
        PromptError: if the file cannot be read, or a line is something else.
    """
    lines = enumerate(
        read_prompt_text(str(path)).split("\n"), 1
    )  # not splitlines: JSON may hold other line ends in its texts
    records = [_parse_task(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not records:
        raise PromptError(f"{path} holds no task")
    return records


def _parse_task(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    kinds = {"kind": str, "messages": list, "tools": list, "thinking": bool, "answer": str, "calls": list}
    if not isinstance(record, dict) or set(record) != set(kinds):
        raise PromptError(f"{where}: a task is a JSON object with {', '.join(kinds)}")
    wrong = [name for name, kind in kinds.items() if not isinstance(record[name], kind)]
    if wrong:
        raise PromptError(f"{where}: {wrong[0]} must be a {kinds[wrong[0]].__name__}")
    return record


def score_answer(task: dict[str, Any], text: str, end: str | None) -> TaskScore:
    """Marks an answer.

    Args:
        task: of the task.
        text: what the model wrote after the prompt, without the token that ended it.
        end: that token, or None if the model did not stop.
    """
    try:
        message = parse_output(text, tools=task["tools"] or None, thinking=task["thinking"])
    except GlmError:
        return TaskScore(task["kind"], task["thinking"], is_correct=False, is_well_formed=False)
    got = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    content = message.content or ""
    if task["calls"]:
        well_formed = end == "<|observation|>" and len(got) == 1 and _matches_schema(got[0], task["tools"])
        return TaskScore(
            task["kind"], task["thinking"], well_formed and got == task["calls"] and not content, well_formed
        )
    right = end == "<|user|>" and content == task["answer"] and not got
    return TaskScore(task["kind"], task["thinking"], right, is_well_formed=True)


def _matches_schema(call: dict[str, Any], tools: Sequence[dict[str, Any]]) -> bool:
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    if call["name"] not in schemas:
        return False
    schema, given = schemas[call["name"]], set(call["arguments"])
    return set(schema.get("required", ())) <= given <= set(schema.get("properties", ()))


def summarize_scores(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """Shares of right answers, in all, by kind and by thinking, and of well-formed calls (None where none was due)."""
    by_kind, by_thinking = defaultdict(list), defaultdict(list)
    for m in scores:
        by_kind[m.kind].append(m.is_correct)
        by_thinking["on" if m.thinking else "off"].append(m.is_correct)
    calls = [m.is_well_formed for m in scores if m.kind == "tool_call"]
    return {
        "tasks": len(scores),
        "exact_match": _share([m.is_correct for m in scores]),
        "by_kind": {kind: _share(rights) for kind, rights in sorted(by_kind.items())},
        "by_thinking": {state: _share(rights) for state, rights in sorted(by_thinking.items())},
        "well_formed_calls": _share(calls),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None
