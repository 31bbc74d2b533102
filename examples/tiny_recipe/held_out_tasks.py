"""The held-out chat tasks: a file of prompts and right answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from convert.quality.task_scoring import TaskScore as TaskScore
from convert.quality.task_scoring import score_answer as score_answer
from convert.quality.task_scoring import summarize_scores as summarize_scores
from examples.tiny_recipe.conversations import Conversation, held_out_conversations

PER_KIND = 25
TOOL_TASKS = 100
SEED = "held-out tasks"


def evaluation_conversations() -> list[Conversation]:
    """The held-out conversations, always the same."""
    return held_out_conversations(Random(SEED), PER_KIND, TOOL_TASKS)


def large_evaluation_conversations(per_kind: int = 60, tool_tasks: int = 200) -> list[Conversation]:
    """A larger set for comparing models that differ little: over 1,000 tasks, always the same, each prompt once.

    They are drawn as :func:`evaluation_conversations` are, from another seed: every instance is one that its own hash holds out
    (:func:`examples.tiny_recipe.tasks.is_held_out`), and neither the training conversations nor the calibration text,
    which are drawn from the other instances, hold any of them in whatever words. Kinds with few held-out instances
    give fewer than ``per_kind``, for repetitions are left out.
    """
    drawn = held_out_conversations(Random(f"{SEED}, more"), per_kind, tool_tasks)
    return list({json.dumps(to_record(item)): item for item in drawn}.values())


def to_record(conversation: Conversation) -> dict[str, Any]:
    """A conversation as one line of the file: messages to send, and the answer or the call that is right."""
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
    """Writes the file, one JSON object per line."""
    path.write_text("".join(json.dumps(to_record(item), ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
