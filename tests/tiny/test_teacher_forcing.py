"""Teacher-forced accuracy equals that of generated answers."""

from random import Random

import pytest

from examples.tiny_recipe import held_out_tasks
from examples.tiny_recipe.conversations import held_out_conversations
from examples.tiny_recipe.evaluate import score_held_out_tasks
from examples.tiny_recipe.teacher_forcing import teacher_forced_correct
from glm_jax.checkpoint import load
from glm_jax.text import render_chat

pytestmark = pytest.mark.usefixtures("lenient")


def test_it_equals_greedy_decoding(tiny_tokenizer, monkeypatch):
    items = [item for item in held_out_conversations(Random(5), 2, 4) if not item.thinking]
    cfg, params, _ = load("tiny", dtype="float32")
    monkeypatch.setattr(held_out_tasks, "evaluation_conversations", lambda: items)
    generated = [score.is_correct for score in score_held_out_tasks(cfg, params, tiny_tokenizer, render_chat)]
    assert teacher_forced_correct(cfg, params, tiny_tokenizer, items, render_chat) == generated
    assert {True, False} <= set(generated)  # both outcomes occur
