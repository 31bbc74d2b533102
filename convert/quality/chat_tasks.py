"""Greedy answers of a model to chat tasks, and the comparison of two models' marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.quality.models import Side
from convert.quality.statistics import paired_bootstrap, paired_ratio
from convert.quality.task_scoring import Mark, mark, summary
from glm_jax.checkpoint.progress import progress_bar
from glm_jax.engine.assets import Companions
from glm_jax.engine.outputs import Completion
from glm_jax.errors import GlmError, PromptError
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer, render_chat

_TOGETHER = 256  # tasks between two steps of the progress bar; the model takes as many as it likes at once


def prompts(tasks: Sequence[Mapping[str, Any]], companions: Companions) -> list[str]:
    """The prompts of tasks, by the model's own chat template.

    Raises:
        PromptError: naming the task that cannot be rendered.
    """
    rendered = []
    for number, task in enumerate(tasks, 1):
        try:
            rendered.append(
                render_chat(
                    task["messages"],
                    task["tools"] or None,
                    template=companions.template,
                    enable_thinking=task["thinking"],
                )
            )
        except GlmError as error:
            raise PromptError(f"chat task {number}: {error}") from None
    return rendered


def answer(
    side: Side, tasks: Sequence[Mapping[str, Any]], given: Sequence[str], *, tokens: int = 64, progress: bool = False
) -> list[Mark]:
    """Marks of a model's greedy answers.

    Args:
        side: the model.
        tasks: as :func:`convert.quality.task_scoring.read_tasks` gives them.
        given: their prompts.
        tokens: most that an answer may have, thinking included; a longer one is wrong.
        progress: show it on stderr.
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens)
    # Prompts of a length share a batch.
    order = sorted(range(len(given)), key=lambda i: len(given[i]))
    marks: dict[int, Mark] = {}
    with progress_bar("answering", len(tasks), unit="tasks", show=progress) as advance:
        for start in range(0, len(order), _TOGETHER):
            part = order[start : start + _TOGETHER]
            answers = side.llm.generate([given[i] for i in part], greedy)
            for i, done in zip(part, answers, strict=True):
                marks[i] = mark(dict(tasks[i]), *_text(done, side.llm.tokenizer))
            advance(len(part))
    return [marks[i] for i in range(len(tasks))]


def _text(done: Completion, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """What was written, special tokens included, and the token that ended it."""
    ended = done.finish_reason == "stop"
    ids = done.token_ids[:-1] if ended else done.token_ids
    end = tokenizer.decode(done.token_ids[-1:], skip_special=False) if ended else None
    return tokenizer.decode(ids, skip_special=False), end


def right(marks: Sequence[Mark]) -> Any:
    """float32 ``[tasks]``: 1 for a right answer, else 0."""
    return np.asarray([m.right for m in marks], np.float32)


def compared(reference: Sequence[Mark], other: Sequence[Mark]) -> dict[str, Any]:
    """The figures of the report: both summaries, and difference and ratio of the right answers with their intervals.

    A task is a unit of the bootstrap, and is drawn for both models together.
    """
    theirs, ours = right(other), right(reference)
    difference, *ends = paired_bootstrap(theirs, ours)
    ratio = paired_ratio(theirs, ours)
    return {
        "reference": summary(reference),
        "model": summary(other),
        "difference": difference,
        "difference_95": ends,
        "ratio": ratio and ratio[0],
        "ratio_95": ratio and list(ratio[1:]),
    }
