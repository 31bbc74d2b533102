"""Opens and loads two models, measures how they differ, and builds the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.quality import chat_tasks, divergence, models
from convert.quality.position_metrics import PositionMetrics
from convert.quality.report_tables import render_quality_report as render_quality_report
from convert.quality.task_scoring import ChatTask, read_chat_tasks
from convert.quality.weight_errors import model_sizes, weight_errors
from convert.verify.options import VerifyOptions
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.open import TINY_MODEL, open_source, tiny_folder
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.compile_cache import enable_compile_cache
from glm_jax.errors import PromptError


def run_verification(options: VerifyOptions, texts: Sequence[str]) -> tuple[dict[str, Any], PositionMetrics | None]:
    """Compares a model with its source.

    Args:
        options: Options of the command, already validated.
        texts: Texts to compare predictions on.

    Returns:
        The report as JSON values, and the metrics of each position if there is a text.

    Raises:
        GlmError: if the models, the texts or the tasks cannot be used.
    """
    enable_compile_cache()
    reference = open_source(options.against, dtype=options.dtype)
    stored = open_source(options.destination, dtype=options.dtype)
    models.check_same_architecture(reference.cfg, stored.cfg)
    model = models.quantize_by_preset(stored, options.quantize, options.method or "mse")
    longest = reference.cfg.max_position_embeddings
    if not 2 <= options.window <= longest:
        raise PromptError(f"--window must be 2 to {longest:,}, the longest context of this model, not {options.window}")
    inputs = None
    if not options.weights_only:
        inputs = _read_inputs(options, reference, stored, texts)
        models.require_device_memory(reference, model, dtype=options.dtype, window=options.window)
    report: dict[str, Any] = {
        "source": {"name": options.against, "kind": reference.info.kind, "size": model_sizes(reference)},
        "model": {
            "name": options.destination,
            "kind": stored.info.kind,
            "quantize": options.quantize,
            "method": (options.method or "mse") if options.quantize else None,
            "cache_dtype": options.cache_dtype,
            "size": model_sizes(model),
        },
        "dtype": options.dtype,
        "weights": weight_errors(reference, model, progress=True),
    }
    if inputs is None:
        return report, None
    predictions, positions = _compare_predictions(options, reference, model, inputs)
    return report | predictions, positions


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    """Inputs of both models.

    Attributes:
        assets: Tokenizer and chat template of the reference and of the other model.
        token_ids: Token ids of each text.
        tasks: Chat tasks.
        prompts: Prompt of each task for the reference and for the other model.
    """

    assets: tuple[ModelAssets, ModelAssets]
    token_ids: list[list[int]]
    tasks: list[ChatTask]
    prompts: tuple[list[str], list[str]]


def _read_inputs(options: VerifyOptions, reference: WeightSource, other: WeightSource, texts: Sequence[str]) -> _Inputs:
    """Reads and checks all inputs, before any weights are read."""
    reference_assets, other_assets = (ModelAssets.load(source.cfg, source.info.folder) for source in (reference, other))
    token_ids = models.encode_texts(texts, reference_assets, other_assets) if texts else []
    tasks: list[ChatTask] = []
    if options.chat:
        tasks = read_chat_tasks(
            tiny_folder() / "heldout_chat.jsonl" if options.chat == TINY_MODEL else Path(options.chat)
        )
    prompts = chat_tasks.render_prompts(tasks, reference_assets), chat_tasks.render_prompts(tasks, other_assets)
    return _Inputs((reference_assets, other_assets), token_ids, tasks, prompts)


def _compare_predictions(
    options: VerifyOptions, reference: WeightSource, other: WeightSource, inputs: _Inputs
) -> tuple[dict[str, Any], PositionMetrics | None]:
    """Returns the report's sections "text" and "chat", where requested, and the metrics of each position."""
    reference_assets, other_assets = inputs.assets
    reference_model = models.load_compared_model(reference, reference_assets, dtype=options.dtype, progress=True)
    other_model = models.load_compared_model(
        other, other_assets, dtype=options.dtype, cache_dtype=options.cache_dtype, progress=True
    )
    sections: dict[str, Any] = {}
    positions = None
    if inputs.token_ids:
        (positions,) = divergence.measure_divergence(
            reference_model,
            [other_model],
            inputs.token_ids,
            window=options.window,
            max_tokens=options.tokens,
            progress=True,
        )
        sections["text"] = {"files": list(options.text), **positions.summary()}
    if inputs.tasks:
        reference_scores, other_scores = (
            chat_tasks.answer_tasks(model, inputs.tasks, prompts, max_tokens=options.answer_tokens, progress=True)
            for model, prompts in zip((reference_model, other_model), inputs.prompts, strict=True)
        )
        comparison = chat_tasks.summarize_comparison(reference_scores, other_scores)
        sections["chat"] = {"file": options.chat, **comparison}
    return sections, positions
