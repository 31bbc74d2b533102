"""Completions: accepted prompts, results, and equality of the fast path with a simple slow one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine import runner
from glm_jax.engine.outputs import Completion
from glm_jax.errors import GlmError, PromptError, SamplingError
from glm_jax.llm import LLM
from glm_jax.sampling import SamplingParams
from tests.builders.llm_checkpoints import CONTEXT_LENGTH

TEXTS = ["def", "def fib(n):\n    return n", "天气很好 🙂", "naïve café, x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, seed=7, ignore_eos=True)
# The checkpoint's defaults are 0.8 and 0.9.
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, seed=7, ignore_eos=True)


def ids_of(found: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in found]


@pytest.fixture(scope="module")
def together(llm: LLM) -> dict[SamplingParams, list[Completion]]:
    """The four texts in one batch."""
    return {params: llm.generate(TEXTS, params) for params in (GREEDY, DRAWN)}


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_of_different_lengths_equals_each_prompt_alone(llm, together, params):
    alone = [llm.generate(text, params) for text in TEXTS]
    assert together[params] == alone
    assert len({len(llm.tokenizer.encode(text)) for text in TEXTS}) == 4
    assert len(set(ids_of(alone))) == 4


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_multi_step_decode_equals_single_steps(llm, together, params):
    for text, whole in zip(TEXTS[:2], together[params], strict=False):
        pieces = list(llm.stream(text, params))
        assert [len(piece.token_ids) for piece in pieces] == [1] * 12
        assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
        assert [piece.completion for piece in pieces] == [None] * 11 + [whole]


def test_greedy_tokens_are_those_of_the_slow_path(llm, together):
    """The slow path runs each whole sequence through the model, without a cache, for every token."""
    apply = jax.jit(lambda tokens: llm.model.apply({"params": llm.params}, tokens)[0])
    rows = [llm.tokenizer.encode(text) for text in TEXTS]
    for _ in range(12):
        padded = np.zeros((4, 40), np.int32)
        for i, ids in enumerate(rows):
            padded[i, : len(ids)] = ids
        logits = np.array(apply(padded))
        logits[..., list(llm.tokenizer.unused_ids)] = -np.inf
        rows = [[*ids, int(logits[i, len(ids) - 1].argmax())] for i, ids in enumerate(rows)]
    assert [tuple(ids[-12:]) for ids in rows] == ids_of(together[GREEDY])


@pytest.mark.parametrize("sizes", [[1] * 40, [3, 1, 64], [64]], ids=str)
def test_the_number_of_steps_per_call_changes_nothing(llm, together, sizes, monkeypatch):
    limits = iter(sizes)
    steps = runner.decode_steps
    monkeypatch.setattr(runner, "decode_steps", lambda *a, **k: steps(*a[:-1], np.int32(next(limits)), **k))
    assert llm.generate(TEXTS, DRAWN) == together[DRAWN]


def test_every_form_of_prompt(llm, together):
    first, second = together[GREEDY][:2]
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    assert (
        llm.generate(TEXTS[0], GREEDY) == llm.generate(ids[0], GREEDY) == llm.generate(tuple(ids[0]), GREEDY) == first
    )
    assert llm.generate(np.asarray(ids[1]), GREEDY) == llm.generate(jnp.asarray(ids[1]), GREEDY) == second
    assert llm.generate(ids, GREEDY) == together[GREEDY]
    assert llm.generate((TEXTS[0], ids[1], np.asarray(ids[2], np.int64), TEXTS[3]), GREEDY) == together[GREEDY]
    assert llm.generate([TEXTS[0]], GREEDY) == [first]
    square = np.asarray([ids[1][:3], ids[3][:3], ids[1][1:4], ids[3][1:4]])
    assert llm.generate(square, GREEDY) == llm.generate(square.tolist(), GREEDY)
    assert [c.prompt_tokens for c in together[GREEDY]] == [len(row) for row in ids]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (["def", ""], "prompt 2 of 2 is empty"),
        (["def", []], "prompt 2 of 2 is empty"),
        (np.zeros(0, np.int32), "the prompt is empty"),
        (None, "a prompt is text, token ids, or a list of these, not NoneType None"),
        (b"def", "not bytes b'def'"),
        ({"role": "user"}, "not dict"),
        (5, "not int 5"),
        ([1.5, 2.5], "prompt 1 of 2 is neither text nor a list of token ids: float 1.5"),
        (np.asarray([1.0, 2.0]), "prompt 1 of 2 is neither text nor a list of token ids"),
        ([True, False], "prompt 1 of 2 is neither"),
        (["def", None], "prompt 2 of 2 is neither"),
        (["def", b"x"], "prompt 2 of 2 is neither"),
        ([[1, 2], [3, "4"]], "prompt 2 of 2 is neither"),
        ([3, 384], "token id 384, which is outside the vocabulary of 384"),
        ([[3], [-1]], "prompt 2 of 2 has token id -1"),
        ([3] * CONTEXT_LENGTH, f"the prompt has {CONTEXT_LENGTH:,} tokens; at most {CONTEXT_LENGTH - 1:,} fit"),
        ("def \udcff", "lone surrogate"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_prompt_is_refused(llm, prompt, message):
    with pytest.raises(PromptError) as caught:
        llm.generate(prompt, max_tokens=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"temprature": 1}, "unknown sampling option temprature"),
        ({"logit_bias": {384: 1.0}}, "token id 384 is outside"),
        ({"stop_token_ids": [384]}, "token id 384 is outside"),
        ({"params": {"temperature": 1}}, "must be SamplingParams or keywords, not dict"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_options_are_refused(llm, options, message):
    with pytest.raises(SamplingError) as caught:
        llm.generate("def", **options)
    assert message in str(caught.value)


def test_defaults_are_the_checkpoints_and_are_replaced_one_by_one(llm):
    assert (llm.defaults.temperature, llm.defaults.top_p) == (0.8, 0.9)
    assert llm.generate("def", max_tokens=12, seed=7, ignore_eos=True) == llm.generate("def", DRAWN)
    assert llm.generate("def", DRAWN, max_tokens=3).token_ids == llm.generate("def", DRAWN).token_ids[:3]


def test_reported_seeds_reproduce(llm):
    first, second, *_ = llm.generate(["def"] * 4, max_tokens=12, ignore_eos=True)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    assert llm.generate("def", DRAWN, seed=first.seed) == first
    assert llm.generate("def", DRAWN, seed=second.seed) == second
    assert len(set(llm.generate(["def"] * 4, DRAWN))) == 1, "a seed that is given holds for every prompt"


def test_a_seed_at_load_repeats_the_seeds_drawn(folder):
    runs = [LLM.load(folder, dtype="float32", seed=seed) for seed in (3, 3, 4)]
    seeds = [[c.seed for c in model.generate(["def"] * 4, max_tokens=1)] for model in runs]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0])) == 4


def test_n_completions_are_those_of_their_seeds_alone(llm):
    several = llm.generate(TEXTS[:2], DRAWN, n=2)
    assert [[c.seed for c in group] for group in several] == [[7, 8], [7, 8]]
    assert several == [[llm.generate(text, DRAWN, seed=seed) for seed in (7, 8)] for text in TEXTS[:2]]
    assert llm.generate(TEXTS[0], DRAWN, n=4)[:2] == several[0]
    assert llm.generate([TEXTS[0]], DRAWN, n=4) == [llm.generate(TEXTS[0], DRAWN, n=4)]


def test_streams_of_n_completions_carry_their_index(llm):
    whole = llm.generate("def", DRAWN, n=4)
    pieces = list(llm.stream("def", DRAWN, n=4))
    for index in range(4):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == whole[index].text
        assert own[-1].completion == whole[index]


def test_more_requests_than_a_batch_holds(llm, monkeypatch):
    monkeypatch.setattr("glm_jax.engine.scheduler.MAX_BATCH_SIZE", 4)
    prompts = [TEXTS[i % 4] for i in range(9)]
    assert llm.generate(prompts, DRAWN) == [llm.generate(text, DRAWN) for text in prompts]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_tokens(llm, together, count):
    found = llm.generate(TEXTS, GREEDY, max_tokens=count)
    assert [c.token_ids for c in found] == [c.token_ids[:count] for c in together[GREEDY]]
    assert {c.finish_reason for c in found} == {"length"}
    assert [c.completion_tokens for c in found] == [count] * 4


@pytest.fixture(scope="module")
def short(folder):
    """A context of 24 tokens."""
    return LLM.load(folder, dtype="float32", max_model_len=24)


def test_the_context_ends_a_completion(llm, short):
    ids = llm.tokenizer.encode("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n" * 2)
    long = short.generate(ids[:18], GREEDY, max_tokens=100)
    assert (len(long.token_ids), long.finish_reason) == (6, "length")
    assert long.token_ids == llm.generate(ids[:18], GREEDY, max_tokens=20).token_ids[:6]
    last = short.generate(ids[:23], GREEDY, max_tokens=100)
    assert (len(last.token_ids), last.finish_reason) == (1, "length")
    assert last.token_ids == llm.generate(ids[:23], GREEDY, max_tokens=20).token_ids[:1]


@pytest.mark.parametrize(("call", "most"), [("generate", 23), ("stream", 23), ("logits", 24), ("mtp_logits", 24)])
def test_what_the_context_cannot_hold_is_refused(short, call, most):
    with pytest.raises(PromptError, match=f"the prompt has {most + 1} tokens; at most {most} fit"):
        getattr(short, call)([1] * (most + 1))


def test_a_score_must_fit_the_context_as_a_whole(short):
    with pytest.raises(PromptError, match="has 26 tokens; at most 24 fit"):
        short.score([1] * 13, [2] * 13)


def test_the_last_slot_of_the_cache_holds_a_token(llm):
    """128 slots, filled to the last one; one more token needs the next capacity."""
    ids = llm.tokenizer.encode("x = fib(n - 1) + 7\n" * 20)[:16]
    full = llm.generate(ids, GREEDY, max_tokens=112)
    more = llm.generate(ids, GREEDY, max_tokens=113)
    assert full.token_ids == more.token_ids[:112]


def test_a_prompt_in_chunks_gives_the_same_tokens(llm, monkeypatch):
    texts = [*TEXTS[1:], "def fib(n):\n    return n if n < 2 else fib(n - 1)\n" * 2]
    lengths = [len(llm.tokenizer.encode(text)) for text in texts]
    whole = llm.generate(texts, DRAWN)
    monkeypatch.setattr(runner, "prefill_chunk_length", lambda rows, on_cpu: 16)
    assert min(lengths) < 16 < 32 < max(lengths), "some prompts must end in an earlier chunk than others"
    assert llm.generate(texts, DRAWN) == whole


def test_chunks_are_narrower_for_many_prompts(llm, together, monkeypatch):
    monkeypatch.setattr(runner, "MAX_BATCHED_PREFILL_TOKENS", 64)  # 4 prompts of 16
    assert llm.generate(TEXTS, DRAWN) == together[DRAWN]


# The tests below share one combination of options, which compiles once.
BIASED = DRAWN.replace(logprobs=20, logit_bias={1: 0.5})


def test_ids_that_the_tokenizer_does_not_have_are_never_written(llm):
    unused = set(llm.tokenizer.unused_ids)
    assert {48, 383} <= unused, "a gap, and the end of the vocabulary"
    found = llm.generate("def", BIASED, logit_bias=dict.fromkeys([48, 340, 383, 60], 100.0))
    assert set(found.token_ids) == {60}
    assert not unused & {token for entry in found.logprobs for token, _ in entry.top}


def test_logit_bias_forces_and_forbids(llm, together):
    first = together[DRAWN][0].token_ids[0]
    assert first not in llm.generate("def", BIASED, logit_bias={first: -100}).token_ids
    assert set(llm.generate("def", BIASED, logit_bias={5: 100}).token_ids) == {5}


def test_logprobs_are_those_of_the_models_logits(llm, together):
    found = llm.generate("def", BIASED, logit_bias={9: 3.0})
    logits = llm.logits([*llm.tokenizer.encode("def"), *found.token_ids])[-13:-1].astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [entry.token_id for entry in found.logprobs] == list(found.token_ids)
    for row, entry in zip(exact, found.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        known = [t for t in np.argsort(-row, kind="stable") if t not in llm.tokenizer.unused_ids]
        assert [token for token, _ in entry.top] == known[:20]
        assert [value for _, value in entry.top] == pytest.approx(row[known[:20]], abs=1e-4)


def test_logprobs_change_no_token_and_are_absent_unless_asked_for(llm, together):
    found = llm.generate("def", BIASED, logit_bias={1: 1e-30})
    assert found.token_ids == together[DRAWN][0].token_ids
    assert together[DRAWN][0].logprobs is None


def test_penalties_follow_the_definition(llm):
    """The expected tokens are those of a greedy loop over the model's logits with explicit penalties."""
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
    prompt = llm.tokenizer.encode("def fib")
    ids, written = list(prompt), []
    for _ in range(12):
        logits = llm.logits(ids)[-1].astype(np.float64)
        logits[list(llm.tokenizer.unused_ids)] = -np.inf
        seen = sorted({*ids})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        for token in set(written):
            logits[token] -= 0.4 + 0.7 * written.count(token)
        ids.append(int(logits.argmax()))
        written.append(ids[-1])
    assert list(llm.generate("def fib", GREEDY, **options).token_ids) == written
    assert list(llm.generate("def fib", GREEDY).token_ids) != written


def test_broken_weights_are_reported(folder):
    broken = LLM.load(folder, dtype="float32")
    broken.params = {**broken.params, "norm": broken.params["norm"] * jnp.nan}
    with pytest.raises(GlmError, match="logits are NaN or infinite: load with check=True"):
        broken.generate("def", GREEDY)


def test_timing_counts_tokens(llm):
    llm.generate(["def", "def fib(n):", "def", "def"], GREEDY)
    timing = llm.timing
    lengths = [len(llm.tokenizer.encode(text)) for text in ("def", "def fib(n):")]
    assert (timing.prompt_tokens, timing.completion_tokens) == (sum(lengths), 48)
    assert 0 < timing.first_token_s <= timing.prefill_s
    assert min(timing.decode_s, timing.decode_tokens_per_s, timing.prefill_tokens_per_s) > 0
