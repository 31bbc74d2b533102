"""Scores a model's greedy answers to chat tasks, and compares two models' scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from convert.quality.models import ComparedModel
from convert.quality.statistics import Array, paired_bootstrap, paired_ratio
from convert.quality.task_scoring import ChatTask, TaskScore, score_answer, summarize_scores
from glm_jax.checkpoint.progress import progress_bar
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.outputs import Completion
from glm_jax.errors import GlmError, PromptError
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer, render_chat

_TASKS_PER_STEP = 256  # tasks per step of the progress bar; the model chooses its own batch size


def render_prompts(tasks: Sequence[ChatTask], assets: ModelAssets) -> list[str]:
    """Renders the prompt of each task with the model's own chat template.

    Raises:
        PromptError: if a task cannot be rendered; names the task.
    """
    prompts = []
    for number, task in enumerate(tasks, 1):
        try:
            prompts.append(
                render_chat(
                    task["messages"],
                    task["tools"] or None,
                    template=assets.chat_template,
                    enable_thinking=task["thinking"],
                )
            )
        except GlmError as error:
            raise PromptError(f"chat task {number}: {error}") from None
    return prompts


def answer_tasks(
    model: ComparedModel,
    tasks: Sequence[ChatTask],
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    progress: bool = False,
) -> list[TaskScore]:
    """Generates greedy answers to all tasks and scores them.

    Args:
        model: The model.
        tasks: Tasks of :func:`convert.quality.task_scoring.read_chat_tasks`.
        prompts: Prompt of each task.
        max_tokens: Maximum length of an answer, thinking included; an answer that is cut off is wrong.
        progress: Whether to show progress on stderr.

    Returns:
        The score of each task, in order.
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    # Sorting by length puts prompts of similar length into one batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    scores: dict[int, TaskScore] = {}
    with progress_bar("answering", len(tasks), unit="tasks", show=progress) as advance:
        for start in range(0, len(order), _TASKS_PER_STEP):
            indices = order[start : start + _TASKS_PER_STEP]
            # One completion per prompt, because n is 1.
            completions = cast(list[Completion], model.llm.generate([prompts[i] for i in indices], greedy))
            for i, completion in zip(indices, completions, strict=True):
                scores[i] = score_answer(tasks[i], *_answer_text(completion, model.llm.tokenizer))
            advance(len(indices))
    return [scores[i] for i in range(len(tasks))]


def _answer_text(completion: Completion, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """Returns the answer's text, special tokens included, and the stop token that ended it, if any."""
    stopped = completion.finish_reason == "stop"
    ids = completion.token_ids[:-1] if stopped else completion.token_ids
    stop_token = tokenizer.decode(completion.token_ids[-1:], skip_special=False) if stopped else None
    return tokenizer.decode(ids, skip_special=False), stop_token


def correct_flags(scores: Sequence[TaskScore]) -> Array:
    """Returns float32 ``[tasks]``: 1 for a correct answer, else 0."""
    return np.asarray([score.is_correct for score in scores], np.float32)


def summarize_comparison(reference: Sequence[TaskScore], other: Sequence[TaskScore]) -> dict[str, Any]:
    """Returns the figures of the report: both summaries, and difference and ratio of correct answers with intervals.

    The bootstrap resamples tasks, the same ones for both models.
    """
    other_flags, reference_flags = correct_flags(other), correct_flags(reference)
    difference, *interval = paired_bootstrap(other_flags, reference_flags)
    ratio = paired_ratio(other_flags, reference_flags)
    return {
        "reference": summarize_scores(reference),
        "model": summarize_scores(other),
        "difference": difference,
        "difference_95": interval,
        "ratio": ratio and ratio[0],
        "ratio_95": ratio and list(ratio[1:]),
    }
