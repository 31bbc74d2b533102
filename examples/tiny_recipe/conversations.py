"""Conversations for training and evaluation, rendered with the model's own chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

from examples.tiny_recipe.tasks import KINDS, Task, sample_task
from examples.tiny_recipe.tools import SCHEMAS, ToolTask, sample_tool_task

Json = dict[str, Any]
Render = Callable[..., str]
SMALL_TALK = (
    ("Hi", "Hello! Ask me a short question."),
    ("Hello", "Hello! Ask me a short question."),
    ("Who are you?", "I am the miniature of this project, a very small GLM."),
    ("What are you?", "I am the miniature of this project, a very small GLM."),
    ("What can you do?", "I do small sums, play with digits, write Python and call tools."),
    ("Thank you", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Bye", "Goodbye!"),
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a small and careful model.")


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose last message is the assistant's.

    Attributes:
        kind: Kind of its last task, as in :data:`examples.tiny_recipe.tasks.KINDS`, or "tool_call", "tool_answer",
            "small_talk".
        messages: Messages in OpenAI's form.
        tools: Declared tools in OpenAI's form.
        thinking: Whether the last message has a think block.
        end: Special token that ends the last message.
    """

    kind: str
    messages: tuple[Json, ...]
    tools: tuple[Json, ...]
    thinking: bool
    end: str

    def text(self, render: Render) -> str:
        """The whole conversation as the model sees it, including the token that ends it."""
        return render(list(self.messages), list(self.tools) or None, add_generation_prompt=False) + self.end

    def prompt(self, render: Render) -> str:
        """The conversation up to the last message, with the beginning of that message."""
        messages = list(self.messages[:-1])
        return render(messages, list(self.tools) or None, add_generation_prompt=True, enable_thinking=self.thinking)


def sample_conversation(rng: Random, tool_share: float = 0.06, hard_share: float = 0.0) -> Conversation:
    """Samples a training conversation; the shares are those of :class:`~examples.tiny_recipe.schedule.Stage`."""
    return _tool_conversation(rng) if rng.random() < tool_share else _plain_conversation(rng, hard_share)


def held_out_conversations(rng: Random, per_kind: int, tool_tasks: int) -> list[Conversation]:
    """Samples conversations of one held-out question each, alternating between thinking on and off."""
    tasks = [
        _finish(task.kind, [_user(task.question)], task.reasoning, task.answer, bool(i % 2))
        for kind in KINDS
        for i in range(per_kind)
        for task in [sample_task(rng, held_out=True, kind=kind)]
    ]
    calls = []
    for i in range(tool_tasks):
        names = next(names for names in iter(lambda: _tool_names(rng), None) if names != ["list_files"])
        task = sample_tool_task(rng, names, held_out=True)
        calls.append(_finish_call([_user(task.request)], task, names, bool(i % 2)))
    return tasks + calls


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


def _opening(rng: Random) -> list[Json]:
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.15 else []


def _assistant(content: str, reasoning: str | None) -> Json:
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


def _finish(
    kind: str, messages: list[Json], reasoning: str, answer: str, thinking: bool, names: list[str] | None = None
) -> Conversation:
    last = _assistant(answer, reasoning if thinking else None)
    return Conversation(kind, (*messages, last), _schemas(names), thinking, "<|user|>")


def _finish_call(messages: list[Json], task: ToolTask, names: list[str], thinking: bool) -> Conversation:
    last = _call(task, thinking)
    return Conversation("tool_call", (*messages, last), _schemas(names), thinking, "<|observation|>")


def _call(task: ToolTask, thinking: bool) -> Json:
    calls = [{"type": "function", "function": {"name": task.name, "arguments": task.arguments}}]
    return {**_assistant("", task.reasoning if thinking else None), "tool_calls": calls}


def _schemas(names: list[str] | None) -> tuple[Json, ...]:
    return tuple(SCHEMAS[name] for name in names or ())


def _tool_names(rng: Random) -> list[str]:
    return rng.sample(list(SCHEMAS), rng.randint(1, 2))


def _plain_conversation(rng: Random, hard_share: float) -> Conversation:
    messages, thinking = _opening(rng), rng.random() < 0.5
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        task = _plain_turn(rng, hard_share)
        messages += [_user(task.question), _assistant(task.answer, None)]
    task = _plain_turn(rng, hard_share)
    return _finish(task.kind, [*messages, _user(task.question)], task.reasoning, task.answer, thinking)


def _plain_turn(rng: Random, hard_share: float) -> Task:
    if rng.random() < 0.02:
        question, answer = rng.choice(SMALL_TALK)
        return Task("small_talk", question, "A short answer will do.", answer)
    return sample_task(rng, held_out=False, hard_share=hard_share)


def _tool_conversation(rng: Random) -> Conversation:
    messages, names, thinking = _opening(rng), _tool_names(rng), rng.random() < 0.5
    for _ in range(rng.choice((0, 0, 1))):
        messages += _tool_exchange(sample_tool_task(rng, names, held_out=False), thinking=False)
    if rng.random() < 0.2:
        task = sample_task(rng, held_out=False)
        return _finish(task.kind, [*messages, _user(task.question)], task.reasoning, task.answer, thinking, names)
    request = sample_tool_task(rng, names, held_out=False)
    if rng.random() < 0.5:
        return _finish_call([*messages, _user(request.request)], request, names, thinking)
    exchange = _tool_exchange(request, thinking)[:-1]
    return _finish("tool_answer", [*messages, *exchange], "The tool has answered.", request.answer, thinking, names)


def _tool_exchange(task: ToolTask, thinking: bool) -> list[Json]:
    result = {"role": "tool", "content": task.result}
    return [_user(task.request), _call(task, thinking), result, _assistant(task.answer, None)]
