"""Logits, activations, the prediction layer and scores, against the NumPy reference of the same checkpoint."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine import scoring
from glm_jax.errors import ConfigError, GlmError, PromptError
from glm_jax.llm import LLM
from tests.builders.hf_checkpoints import read_tensors
from tests.builders.jitted_model import is_close
from tests.builders.llm_checkpoints import CONFIG, write_random_model
from tests.reference import ReferenceModel

PROMPTS = [[5, 9, 77, 120, 3, 250], [60, 61], [7, 7, 7, 300, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceModel:
    return ReferenceModel(read_tensors(folder), CONFIG)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()


def test_logits_of_one_prompt(llm, reference):
    expected = reference.logits(PROMPTS[0])
    for form in (PROMPTS[0], tuple(PROMPTS[0]), np.asarray(PROMPTS[0]), jnp.asarray(PROMPTS[0])):
        found = llm.logits(form)
        assert (found.shape, found.dtype, type(found)) == ((6, 384), np.float32, np.ndarray)
        assert is_close(found, expected)
    text = "def fib(n):"
    np.testing.assert_array_equal(llm.logits(text), llm.logits(llm.tokenizer.encode(text)))


def test_logits_of_equal_lengths_are_one_array(llm, reference):
    square = np.asarray([PROMPTS[0], PROMPTS[0][::-1], PROMPTS[2][:6], PROMPTS[2][3:]])
    found = llm.logits(square)
    assert (found.shape, found.dtype) == ((4, 6, 384), np.float32)
    assert all(is_close(a, reference.logits(row)) for a, row in zip(found, square, strict=True))
    np.testing.assert_array_equal(llm.logits(square.tolist()), found)


def test_logits_of_different_lengths_are_a_list(llm, reference):
    found = llm.logits(PROMPTS)
    assert isinstance(found, list)
    assert [a.shape for a in found] == [(6, 384), (2, 384), (9, 384)]
    assert all(is_close(a, reference.logits(row)) for a, row in zip(found, PROMPTS, strict=True))


def test_logits_in_chunks_and_batches(llm, reference, monkeypatch):
    """More prompts than one batch holds, longer than a chunk."""
    rows = [[(i * k) % 340 for i in range(1, 21 + k)] for k in range(1, 6)]
    monkeypatch.setattr(scoring, "PREFILL_CHUNK_SIZE", 16)
    monkeypatch.setattr(scoring, "MAX_BATCHED_LOGITS_TOKENS", 64)
    found = llm.logits(rows)
    assert all(is_close(a, reference.logits(row)) for a, row in zip(found, rows, strict=True))


def test_trace_and_edit(llm, reference):
    names = ["block.1.moe.router", "block.2.out", "embed"]
    logits, trace = llm.logits(PROMPTS[0], trace=names)
    record: dict[str, np.ndarray] = {}
    assert is_close(logits, reference.logits(PROMPTS[0], record=record))
    assert sorted(trace) == sorted(names)
    assert trace["block.1.moe.router"].shape == (6, 7)
    for name in names:
        assert is_close(trace[name], record[name]), name
    batch, traced = llm.logits([PROMPTS[0]], trace=names)
    assert (batch.shape, traced["embed"].shape) == ((1, 6, 384), (1, 6, 64))
    np.testing.assert_array_equal(batch[0], logits)

    edited, _ = llm.logits(PROMPTS[0], edit={"block.1.attn": jnp.zeros_like})
    assert is_close(edited, reference.logits(PROMPTS[0], edits={"block.1.attn": np.zeros_like}))
    assert not is_close(edited, logits)


def test_what_cannot_be_traced(llm):
    with pytest.raises(ConfigError, match=r"no activation .block\.9\.out"):
        llm.logits(PROMPTS[0], trace=["block.9.out"])
    with pytest.raises(PromptError, match="must have the same length"):
        llm.logits(PROMPTS, trace=["embed"])


def test_mtp_logits(llm, reference):
    """Entry p is the reference's draft from the hidden state at p and token p + 1; the last takes the argmax."""
    for row in (PROMPTS[0], PROMPTS[2]):
        hidden = reference.hidden(row)
        following = [*row[1:], int(reference.head(hidden[-1:]).argmax())]
        expected, _ = reference.draft(hidden, following)
        found = llm.mtp_logits(row)
        assert found.shape == (len(row), 384)
        assert is_close(found, expected)
    batch_logits = llm.mtp_logits(PROMPTS)
    assert [a.shape[0] for a in batch_logits] == [6, 2, 9]
    assert is_close(batch_logits[2], found)
    assert llm.mtp_logits([PROMPTS[0], PROMPTS[2][:6]]).shape == (2, 6, 384)


@pytest.fixture
def long_prompt(monkeypatch):
    """Two whole chunks and a part of a third."""
    monkeypatch.setattr(scoring, "PREFILL_CHUNK_SIZE", 16)
    return [(7 * i) % 340 for i in range(1, 40)]


def test_mtp_logits_in_chunks(llm, reference, long_prompt):
    hidden = reference.hidden(long_prompt)
    following = [*long_prompt[1:], int(reference.head(hidden[-1:]).argmax())]
    assert is_close(llm.mtp_logits(long_prompt), reference.draft(hidden, following)[0])


@pytest.mark.parametrize("split", [3, 16, 17, 36])
def test_a_score_keeps_the_continuation_only(llm, reference, long_prompt, split):
    exact = log_softmax(reference.logits(long_prompt))
    expected = [exact[i - 1, token] for i, token in enumerate(long_prompt)][split:]
    assert llm.score(long_prompt[:split], long_prompt[split:]).token_logprobs == pytest.approx(expected, abs=1e-4)


def test_score_is_the_sum_of_the_models_logprobs(llm, reference):
    before, after = PROMPTS[2][:4], PROMPTS[2][4:]
    score = llm.score(before, after)
    exact = log_softmax(reference.logits([*before, *after]))
    expected = [exact[3 + i, token] for i, token in enumerate(after)]
    assert score.token_ids == tuple(after)
    assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(sum(expected), abs=1e-4)
    assert score.total == pytest.approx(sum(score.token_logprobs), abs=1e-5)
    text = llm.score("def fib", "(n):")
    assert list(text.token_ids) == llm.tokenizer.encode("(n):")


def test_a_score_needs_both_parts(llm):
    with pytest.raises(PromptError, match="empty"):
        llm.score("", "x")
    with pytest.raises(PromptError, match="empty"):
        llm.score("x", "")


def test_latent_eps_changes_the_norms_inside_the_attention(folder):
    other = LLM.load(folder, dtype="float32", latent_eps=0.5)
    assert other.config.latent_eps == 0.5
    expected = ReferenceModel(read_tensors(folder), CONFIG, latent_eps=0.5).logits(PROMPTS[0])
    assert is_close(other.logits(PROMPTS[0]), expected)
    assert not is_close(ReferenceModel(read_tensors(folder), CONFIG).logits(PROMPTS[0]), expected)


def test_a_model_without_a_prediction_layer_says_so(tmp_path):
    bare = LLM.load(write_random_model(tmp_path / "bare", num_nextn_predict_layers=0), dtype="float32")
    with pytest.raises(GlmError, match="no multi-token-prediction layer"):
        bare.mtp_logits(PROMPTS[0])
