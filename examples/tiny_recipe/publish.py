"""Turns a run's folder into the published one: weights, tokenizer, metrics, training curve and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from examples.tiny_recipe import corpus, held_out_tasks, model_card
from examples.tiny_recipe.evaluate import evaluate
from examples.tiny_recipe.export import cast_to_stored_dtypes, export_hf_folder
from examples.tiny_recipe.schedule import TrainingSchedule, tiny_config
from examples.tiny_recipe.train_step import initial_state
from examples.tiny_recipe.training_checkpoint import load_state
from examples.tiny_recipe.training_loop import RunFiles
from glm_jax.text import render_chat


def publish(files: RunFiles, folder: Path) -> None:
    """Exports a run's checkpoint to ``folder``, evaluates the exported weights, and writes the card."""
    cfg = tiny_config()
    facts = json.loads(files.plan.read_text())
    any_schedule = TrainingSchedule(steps=1, decay_steps=1)  # the state's shapes do not depend on it
    step, state = load_state(files.state, initial_state(cfg, any_schedule))
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    export_hf_folder(folder, cfg, state.params, tokenizer)
    held_out = corpus.split_held_out(corpus.library_files())[1]
    stored = jax.tree.map(lambda a: a.astype(jnp.float32), cast_to_stored_dtypes(state.params))
    metrics = evaluate(cfg, stored, tokenizer, held_out, render_chat)
    metrics["run"] = _run_facts(facts, step, state.params, tokenizer)
    held_out_tasks.write_tasks(folder / model_card.TASKS_FILE, held_out_tasks.evaluation_conversations())
    (folder / model_card.METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")
    model_card.write_curve(folder / model_card.CURVE_FILE, model_card.read_log(files.log))
    (folder / model_card.CARD_FILE).write_text(model_card.render_card(metrics, held_out), encoding="utf-8")
    print(json.dumps(metrics, indent=2))


def _run_facts(facts: dict[str, Any], step: int, params: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **facts,
        "trained_steps": step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "vocabulary": tokenizer.get_vocab_size(),
    }
