"""Batches: pure functions of the step, each library token once per epoch, weights on the assistant's tokens."""

import dataclasses

import numpy as np
import pytest

from examples.tiny_recipe.batches import TARGET_LOOKAHEAD, Batches, encode_conversation
from examples.tiny_recipe.conversations import Conversation
from examples.tiny_recipe.schedule import BatchShape, Stage, TrainingSchedule
from examples.tiny_recipe.tokenizer import LEARNED_VOCAB, SPECIAL_IDS, SPECIAL_TOKENS
from glm_jax.text import render_chat
from tests.tiny.conftest import CODE_TEXTS


@pytest.fixture(scope="module")
def batches(small_plan, tiny_tokenizer):
    return Batches(small_plan, tiny_tokenizer, CODE_TEXTS, render_chat)


def test_a_step_always_gives_the_same_bytes(batches, small_plan, tiny_tokenizer):
    again = Batches(small_plan, tiny_tokenizer, CODE_TEXTS, render_chat)
    backwards = {step: again(step) for step in reversed(range(small_plan.steps))}
    for step in range(small_plan.steps):
        for first, second in zip(batches(step), backwards[step], strict=True):
            np.testing.assert_array_equal(first.tokens, second.tokens)
            np.testing.assert_array_equal(first.weights, second.weights)


def test_shapes_follow_the_schedule(batches, small_plan):
    for step in range(small_plan.steps):
        code, chat = batches(step)
        stage = small_plan.stage(step)
        assert code.tokens.shape == code.weights.shape == (stage.code.count, stage.code.length + TARGET_LOOKAHEAD)
        assert chat.tokens.shape == chat.weights.shape == (stage.chat.count, stage.chat.length + TARGET_LOOKAHEAD)
        assert code.tokens.dtype == chat.tokens.dtype == np.int32
        assert max(code.tokens.max(), chat.tokens.max()) < LEARNED_VOCAB + len(SPECIAL_TOKENS)


def test_an_epoch_reads_every_window_once(tiny_tokenizer):
    plan = TrainingSchedule(
        steps=100, decay_steps=1, stages=(Stage(start=0, code=BatchShape(3, 16), chat=BatchShape(1, 96)),)
    )
    batches = Batches(plan, tiny_tokenizer, CODE_TEXTS, render_chat)
    windows = (batches.epoch_tokens - TARGET_LOOKAHEAD) // 16
    rows = [row for step in range(-(-2 * windows // 3)) for row in batches(step)[0].tokens]
    stream = [i for text in CODE_TEXTS for i in (SPECIAL_IDS["<|endoftext|>"], *tiny_tokenizer.encode(text).ids)]
    whole = sorted(tuple(stream[i * 16 : i * 16 + 16 + TARGET_LOOKAHEAD]) for i in range(windows))
    first, second = rows[:windows], rows[windows : 2 * windows]
    assert sorted(tuple(row.tolist()) for row in first) == whole
    assert sorted(tuple(row.tolist()) for row in second) == whole
    assert [row.tolist() for row in first] != [row.tolist() for row in second]


def test_assistant_tokens_have_full_weight(tiny_tokenizer):
    messages = ({"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"})
    conversation = Conversation("add", messages, (), False, "<|user|>")
    ids, weights = encode_conversation(conversation, tiny_tokenizer, render_chat, 0.25)
    assistant_text = tiny_tokenizer.decode(ids[weights == 1].tolist(), skip_special_tokens=False)
    assert assistant_text == "</think>2<|user|>"
    assert set(weights.tolist()) == {0.25, 1.0}


def test_rows_of_conversations_begin_with_one_and_pad_without_weight(batches):
    for step in range(6):
        _, chat = batches(step)
        assert (chat.tokens[:, 0] == SPECIAL_IDS["[gMASK]"]).all()
        padding = chat.tokens == SPECIAL_IDS["<|endoftext|>"]
        assert (chat.weights[padding] == 0).all()
        assert (chat.weights[~padding] > 0).all()


def test_another_seed_gives_other_batches(batches, small_plan, tiny_tokenizer):
    other = Batches(dataclasses.replace(small_plan, seed=1), tiny_tokenizer, CODE_TEXTS, render_chat)
    for batch, other_batch in zip(batches(0), other(0), strict=True):
        assert not np.array_equal(batch.tokens, other_batch.tokens)
