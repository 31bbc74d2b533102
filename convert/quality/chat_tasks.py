"""Greedy answers of a model to chat tasks, and the comparison of two models' marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.quality.models import ComparedModel
from convert.quality.statistics import paired_bootstrap, paired_ratio
from convert.quality.task_scoring import TaskScore, score_answer, summarize_scores
from glm_jax.checkpoint.progress import progress_bar
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.outputs import Completion
from glm_jax.errors import GlmError, PromptError
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer, render_chat

_TASKS_PER_STEP = 256  # tasks between two steps of the progress bar; the model takes as many as it likes at once


def render_prompts(tasks: Sequence[Mapping[str, Any]], assets: ModelAssets) -> list[str]:
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
                    template=assets.chat_template,
                    enable_thinking=task["thinking"],
                )
            )
        except GlmError as error:
            raise PromptError(f"chat task {number}: {error}") from None
    return rendered


def answer_tasks(
    model: ComparedModel,
    tasks: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    progress: bool = False,
) -> list[TaskScore]:
    """Marks of a model's greedy answers.

    Args:
        model: the model.
        tasks: as :func:`convert.quality.task_scoring.read_chat_tasks` gives them.
        prompts: their prompts.
        max_tokens: most that an answer may have, thinking included; a longer one is wrong.
        progress: show it on stderr.
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    # Prompts of a length share a batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    marks: dict[int, TaskScore] = {}
    with progress_bar("answering", len(tasks), unit="tasks", show=progress) as advance:
        for start in range(0, len(order), _TASKS_PER_STEP):
            part = order[start : start + _TASKS_PER_STEP]
            answers = model.llm.generate([prompts[i] for i in part], greedy)
            for i, done in zip(part, answers, strict=True):
                marks[i] = score_answer(dict(tasks[i]), *_text(done, model.llm.tokenizer))
            advance(len(part))
    return [marks[i] for i in range(len(tasks))]


def _text(done: Completion, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """What was written, special tokens included, and the token that ended it."""
    ended = done.finish_reason == "stop"
    ids = done.token_ids[:-1] if ended else done.token_ids
    end = tokenizer.decode(done.token_ids[-1:], skip_special=False) if ended else None
    return tokenizer.decode(ids, skip_special=False), end


def correct_flags(scores: Sequence[TaskScore]) -> Any:
    """float32 ``[tasks]``: 1 for a right answer, else 0."""
    return np.asarray([m.is_correct for m in scores], np.float32)


def summarize_comparison(reference: Sequence[TaskScore], other: Sequence[TaskScore]) -> dict[str, Any]:
    """The figures of the report: both summaries, and difference and ratio of the right answers with their intervals.

    A task is a unit of the bootstrap, and is drawn for both models together.
    """
    theirs, ours = correct_flags(other), correct_flags(reference)
    difference, *ends = paired_bootstrap(theirs, ours)
    ratio = paired_ratio(theirs, ours)
    return {
        "reference": summarize_scores(reference),
        "model": summarize_scores(other),
        "difference": difference,
        "difference_95": ends,
        "ratio": ratio and ratio[0],
        "ratio_95": ratio and list(ratio[1:]),
    }
