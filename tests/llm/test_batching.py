"""Batch sizes: as many requests run together as the memory plan allows."""

import dataclasses

import pytest

from glm_jax.engine.runner import ModelRunner
from glm_jax.llm import LLM
from glm_jax.sampling import SamplingParams
from tests.builders.llm_checkpoints import CONTEXT_LENGTH

GREEDY = SamplingParams(temperature=0, max_tokens=4, seed=7, ignore_eos=True)
TEXTS = ["def", "def fib(n):", "x = 1", "naïve", "return"]


@pytest.fixture
def batches(monkeypatch):
    """The number of requests in each batch; nothing runs."""
    seen = []
    monkeypatch.setattr(ModelRunner, "run", lambda self, requests, *_, **__: seen.append(len(requests)) or ())
    return seen


@pytest.fixture
def holding(llm, monkeypatch):
    """Gives the model memory for `count` sequences of `slots` tokens."""

    def holding(count, slots=128):
        room = llm._memory_model.requirement(count, slots).total
        monkeypatch.setattr(llm, "_memory_model", dataclasses.replace(llm._memory_model, device_bytes=room))

    return holding


def test_the_memory_plan_of_loading_is_kept(llm):
    assert llm._memory_model.cfg == llm.config
    assert llm._memory_model.placement.cache_dtype == "float32"
    assert llm._memory_model.max_context(1) >= llm.max_model_len == CONTEXT_LENGTH


@pytest.mark.parametrize(("rows", "sizes"), [(8, [5]), (7, [4, 1]), (4, [4, 1]), (3, [2, 2, 1]), (1, [1] * 5)])
def test_batches_are_what_fits_padded_to_a_power_of_two(llm, batches, holding, rows, sizes):
    holding(rows)
    assert len(llm.generate(TEXTS, GREEDY)) == 5
    assert batches == sizes


def test_longer_sequences_make_smaller_batches(llm, batches, holding):
    holding(4)
    llm.generate(TEXTS[:4], GREEDY, max_tokens=100)
    assert batches == [4]
    batches.clear()
    llm.generate(TEXTS[:4], GREEDY, max_tokens=300)
    assert max(batches) < 4
    assert sum(batches) == 4


def test_the_prompts_own_cache_counts_while_it_is_copied(llm, batches, holding):
    holding(4)
    llm.generate("def", GREEDY, n=4)
    assert batches == [2, 2]


def test_a_stream_of_many_completions_is_batched_too(llm, batches, holding):
    holding(4)
    assert list(llm.stream("def", GREEDY, n=4)) == []
    assert batches == [2, 2]
    batches.clear()
    holding(1000)
    list(llm.stream("def", GREEDY, n=100))
    assert batches == [64, 36]


def test_a_single_request_always_runs(llm, batches, holding):
    holding(1, 1)
    llm.generate(TEXTS[:2], GREEDY)
    assert batches == [1, 1]


def test_a_model_built_by_hand_has_no_memory_plan(llm, batches):
    model = LLM(llm.config, llm.params, llm._input_processor.assets)
    model.generate(TEXTS, GREEDY)
    assert batches == [5]
