"""The held-out chat tasks: a file of prompts and right answers, and the marking of a model's answers."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from examples.tiny_recipe.chat import Conversation, held_out_conversations
from glm_jax.errors import GlmError
from glm_jax.text import parse_output

PER_KIND = 25
TOOL_TASKS = 100
SEED = "held-out tasks"


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """One answer: whether it is right to the letter, and whether its tool call (if one was due) is well formed."""

    kind: str
    thinking: bool
    right: bool
    well_formed: bool


def conversations() -> list[Conversation]:
    """The held-out conversations, always the same."""
    return held_out_conversations(Random(SEED), PER_KIND, TOOL_TASKS)


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


def mark(record: dict[str, Any], text: str, end: str | None) -> Mark:
    """Marks an answer.

    Args:
        record: of the task.
        text: what the model wrote after the prompt, without the token that ended it.
        end: that token, or None if the model did not stop.
    """
    try:
        message = parse_output(text, tools=record["tools"] or None, thinking=record["thinking"])
    except GlmError:
        return Mark(record["kind"], record["thinking"], right=False, well_formed=False)
    got = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    content = message.content or ""
    if record["calls"]:
        well_formed = end == "<|observation|>" and len(got) == 1 and _fits(got[0], record["tools"])
        return Mark(
            record["kind"], record["thinking"], well_formed and got == record["calls"] and not content, well_formed
        )
    right = end == "<|user|>" and content == record["answer"] and not got
    return Mark(record["kind"], record["thinking"], right, well_formed=True)


def _fits(call: dict[str, Any], tools: Sequence[dict[str, Any]]) -> bool:
    required = {t["function"]["name"]: set(t["function"]["parameters"]["required"]) for t in tools}
    return call["name"] in required and set(call["arguments"]) == required[call["name"]]


def summary(marks: Sequence[Mark]) -> dict[str, Any]:
    """Shares of right answers, in all, by kind and by thinking, and of well-formed calls."""
    by_kind, by_thinking = defaultdict(list), defaultdict(list)
    for m in marks:
        by_kind[m.kind].append(m.right)
        by_thinking["on" if m.thinking else "off"].append(m.right)
    calls = [m.well_formed for m in marks if m.kind == "tool_call"]
    return {
        "tasks": len(marks),
        "exact_match": _share([m.right for m in marks]),
        "by_kind": {kind: _share(rights) for kind, rights in sorted(by_kind.items())},
        "by_thinking": {state: _share(rights) for state, rights in sorted(by_thinking.items())},
        "well_formed_calls": _share(calls),
    }


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 4)
