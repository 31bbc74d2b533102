"""From a run's folder to the folder that ships: weights, tokenizer, figures, curve and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from examples.tiny_recipe import corpus
from examples.tiny_recipe import held_out_tasks as heldout
from examples.tiny_recipe import model_card as card
from examples.tiny_recipe.evaluate import evaluate
from examples.tiny_recipe.export import as_stored, export
from examples.tiny_recipe.schedule import Plan, tiny_config
from examples.tiny_recipe.train_step import initial_state
from examples.tiny_recipe.training_checkpoint import load_state
from examples.tiny_recipe.training_loop import RunFiles
from glm_jax.text import render_chat


def publish(files: RunFiles, folder: Path) -> None:
    """Exports a run's checkpoint to ``folder``, measures what was exported, and writes the card beside it."""
    cfg = tiny_config()
    facts = json.loads(files.plan.read_text())
    shape_only = Plan(steps=1, decay_steps=1)
    step, state = load_state(files.state, initial_state(cfg, shape_only))
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    export(folder, cfg, state.params, tokenizer)
    held_out = corpus.split(corpus.library_files())[1]
    stored = jax.tree.map(lambda a: a.astype(jnp.float32), as_stored(state.params))
    metrics = evaluate(cfg, stored, tokenizer, held_out, render_chat)
    metrics["run"] = _run_facts(facts, step, state.params, tokenizer)
    heldout.write_tasks(folder / card.TASKS, heldout.conversations())
    (folder / card.METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    card.write_curve(folder / card.CURVE, card.read_log(files.log))
    (folder / card.CARD).write_text(card.card(metrics, held_out), encoding="utf-8")
    print(json.dumps(metrics, indent=2))


def _run_facts(facts: dict[str, Any], step: int, params: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **facts,
        "trained_steps": step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "vocabulary": tokenizer.get_vocab_size(),
    }
