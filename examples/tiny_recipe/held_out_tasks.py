"""The held-out chat tasks: prompts and their only correct answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from convert.quality.task_scoring import ChatTask
from convert.quality.task_scoring import TaskScore as TaskScore
from convert.quality.task_scoring import score_answer as score_answer
from convert.quality.task_scoring import summarize_scores as summarize_scores
from examples.tiny_recipe.conversations import Conversation, held_out_conversations

PER_KIND = 25
TOOL_TASKS = 100
SEED = "held-out tasks"


def evaluation_conversations() -> list[Conversation]:
    """The held-out conversations of the evaluation; always the same."""
    return held_out_conversations(Random(SEED), PER_KIND, TOOL_TASKS)


def large_evaluation_conversations(per_kind: int = 60, tool_tasks: int = 200) -> list[Conversation]:
    """A larger set of over 1,000 held-out conversations, for comparing similar models; always the same.

    The conversations are sampled like :func:`evaluation_conversations`, from another seed. The hash of an instance
    decides whether it is held out (:func:`examples.tiny_recipe.tasks.is_held_out`). Training conversations and the
    calibration text are sampled from the other instances, so they contain no held-out instance in any wording. Each
    prompt occurs once; kinds with few held-out instances give fewer than ``per_kind``.
    """
    sampled = held_out_conversations(Random(f"{SEED}, more"), per_kind, tool_tasks)
    return list({json.dumps(to_record(item)): item for item in sampled}.values())


def to_record(conversation: Conversation) -> ChatTask:
    """A conversation as a JSON record: the messages to send, and the correct answer or tool call."""
    last = conversation.messages[-1]
    calls = [call["function"] for call in last.get("tool_calls", ())]
    return {
        "kind": conversation.kind,
        "messages": list(conversation.messages[:-1]),
        "tools": list(conversation.tools),
        "thinking": conversation.thinking,
        "answer": last["content"],
        "calls": calls,
    }


def write_tasks(path: Path, items: Iterable[Conversation]) -> None:
    """Writes tasks to a file with one JSON object per line."""
    path.write_text("".join(json.dumps(to_record(item), ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
