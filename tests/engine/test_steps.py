"""The compiled functions: chunks, multi-step decode, finished sequences, donation, and what recompiles."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.cache import LatentCache
from glm_jax.engine.scoring import mtp_chunk_logits, prefill_chunk_logits
from glm_jax.engine.steps import NO_TOKEN, _jit_decode, bucket_size, decode_steps, prefill_chunk, start_decode
from glm_jax.model import GLM
from glm_jax.sampling import SamplerState, SamplingParams
from tests.builders.jitted_model import is_close
from tests.builders.small_models import MODEL_VARIANTS

SMALL = MODEL_VARIANTS["odd"]
MODEL, VOCAB = GLM(SMALL.cfg), SMALL.cfg.vocab_size
SLOTS, STEPS = 32, 4
PROMPTS = [[5, 9, 2, 77, 31, 8, 64], [3], [12, 13, 14, 15]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, logprobs=1)
DRAWN = SamplingParams(temperature=1.5, top_p=1, max_tokens=20, logprobs=1)
END = 7


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def new_cache(rows=4):
    return LatentCache.create(SMALL.cfg, rows, SLOTS, jnp.float32)


def block(start=0, width=8):
    """One chunk of the prompts, padded on the right; the fourth row pads the batch."""
    padded = np.zeros((4, SLOTS), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=False):
        row[: len(prompt)] = prompt
    return padded[:, start : start + width]


LENGTHS = np.asarray([len(prompt) for prompt in PROMPTS] + [1], np.int32)


def prefill(width=8, longest=8):
    cache, logits = new_cache(), jnp.full((4, VOCAB), 1e9, jnp.float32)
    for start in range(0, longest, width):
        tokens = block(start, width)
        cache, logits = prefill_chunk(MODEL, SMALL.params, cache, logits, tokens, np.int32(start), LENGTHS)
    return cache, logits


def sampler(params, vocab=VOCAB):
    several = [params] * 4 if isinstance(params, SamplingParams) else params
    prompts = [*PROMPTS, [0]]
    return SamplerState.create(several, [1, 2, 3, 4], prompts, vocab_size=VOCAB, valid_vocab=vocab, eos_ids=(END,))


def started(params=GREEDY, remaining=(20, 20, 20, 20), logits=None):
    cache, own = prefill()
    is_padding = np.asarray([False, False, False, True])
    logits = own if logits is None else logits
    return start_decode(cache, logits, LENGTHS, np.asarray(remaining, np.int32), is_padding, sampler(params))


def steps(state, limit=STEPS, params=None):
    return decode_steps(MODEL, SMALL.params if params is None else params, state, np.int32(limit), steps=STEPS)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def generated(first, *more):
    """Generated tokens of each sequence over all calls."""
    return np.concatenate([np.asarray(part.tokens) for part in (first, *more)], axis=1)


@given(st.integers(0, 1 << 40), st.integers(0, 12))
def test_buckets_are_the_next_power_of_two(n, smallest_bits):
    found = bucket_size(n, 1 << smallest_bits)
    assert found >= max(n, 1 << smallest_bits)
    assert found & (found - 1) == 0
    assert found == 1 << smallest_bits or found < 2 * n


def test_a_prompt_in_chunks_is_the_prompt(expected):
    """Prompts that ended in an earlier chunk keep their logits; none of the initial logits remain."""
    whole, chunked = prefill(8), prefill(4)
    for row, prompt in enumerate(PROMPTS):
        assert is_close(whole[1][row], expected[row])
        assert is_close(chunked[1][row], expected[row])
        slots = np.s_[:, row, : len(prompt)]
        assert is_close(np.asarray(chunked[0].data)[slots], np.asarray(whole[0].data)[slots])


@pytest.fixture(scope="module")
def expected():
    """The last logits of each prompt alone, by the NumPy reference."""
    return [SMALL.reference.logits(np.asarray(prompt))[-1] for prompt in PROMPTS]


def test_logits_of_every_token_in_chunks():
    cache, parts = new_cache(), []
    for start in (0, 4):
        cache, logits = prefill_chunk_logits(MODEL, SMALL.params, cache, block(start, 4), np.int32(start))
        parts.append(logits)
    assert is_close(np.concatenate(parts, axis=1)[0, :7], SMALL.reference.logits(np.asarray(PROMPTS[0])))


def mtp(tokens, width):
    """Logits of the prediction layer for one sequence, in chunks."""
    padded = np.zeros((1, SLOTS + 1), np.int32)
    padded[0, : len(tokens)] = tokens
    cache = LatentCache.create(SMALL.cfg, 1, SLOTS, jnp.float32)
    drafts = LatentCache.create(SMALL.cfg, 1, SLOTS, jnp.float32, layers=1)
    parts = []
    for start in range(0, len(tokens), width):
        chunk, next_tokens = padded[:, start : start + width], padded[:, start + 1 : start + 1 + width]
        cache, drafts, logits = mtp_chunk_logits(
            MODEL, SMALL.params, cache, drafts, chunk, next_tokens, np.int32(start), np.int32(len(tokens) - 1)
        )
        parts.append(logits[0])
    return np.concatenate(parts)[: len(tokens)]


def test_the_prediction_layers_last_entry_is_joined_with_the_argmax(expected):
    """Neither chunks nor padding on the right change anything."""
    narrow = mtp(PROMPTS[0], 8)
    given = mtp([*PROMPTS[0], int(expected[0].argmax())], 8)
    assert is_close(narrow, given[:7])
    assert is_close(narrow, mtp(PROMPTS[0], 4))


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_multi_step_decode_equals_single_steps(params):
    state, first = started(params)
    state, bulk = steps(state)
    one, single = started(params)
    assert (single.tokens == first.tokens).all()
    parts = []
    for _ in range(STEPS):
        one, part = steps(one, 1)
        assert (part.tokens[:, 1:] == NO_TOKEN).all()
        parts.append(jax.tree.map(lambda x: x[:, :1], part))
    for name in ("tokens", "logprobs", "top_ids", "top_logprobs"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(joined, getattr(bulk, name))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a, b)


def test_greedy_steps_follow_the_reference():
    state, first = started()
    rows = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, first.tokens[:3, 0], strict=True)]
    _, more = steps(state)
    for row, tokens in zip(rows, np.asarray(more.tokens), strict=False):
        for token, logprob in zip(tokens, np.asarray(more.logprobs)[rows.index(row)], strict=True):
            logits = SMALL.reference.logits(np.asarray(row))[-1]
            assert int(token) == int(logits.argmax())
            exact = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            assert is_close(logprob, exact[token])
            row.append(int(token))


def test_the_first_token_is_sampled_from_the_prompts_logits(expected):
    state, first = started()
    assert first.tokens[:3, 0].tolist() == [int(logits.argmax()) for logits in expected]
    assert first.tokens[3].tolist() == [NO_TOKEN]
    assert state.positions.tolist() == LENGTHS.tolist()
    assert state.remaining.tolist() == [19, 19, 19, 20]
    assert state.done.tolist() == [False, False, False, True]
    assert first.top_ids.shape == (4, 1, 1)


def test_finished_sequences_output_nothing_and_keep_their_position():
    state, first = started(remaining=(1, 3, 20, 20))
    assert state.done.tolist() == [True, False, False, True]
    before = state.positions.tolist()
    state, more = steps(state)
    tokens = generated(first, more)
    assert [int((row != NO_TOKEN).sum()) for row in tokens] == [1, 3, 5, 0]
    assert all((row[count:] == NO_TOKEN).all() for row, count in zip(tokens, [1, 3, 5, 0], strict=True))
    assert [a - b for a, b in zip(state.positions.tolist(), before, strict=True)] == [0, 2, 4, 0]
    assert state.remaining.tolist() == [0, 0, 15, 20]
    free = generated(*_run(started()))
    np.testing.assert_array_equal(tokens[2], free[2])
    np.testing.assert_array_equal(tokens[1, :3], free[1, :3])


def _run(start):
    state, first = start
    return first, steps(state)[1]


def test_decoding_ends_when_all_sequences_are_finished():
    """No further step is computed: the cache is not generated at its slot."""
    state, _ = started(remaining=(2, 2, 2, 20))
    state, more = steps(state)
    assert state.done.all()
    assert (more.tokens[:, 1:] == NO_TOKEN).all()
    cache = np.asarray(state.cache.data)
    for row, length in enumerate(LENGTHS[:3]):
        assert cache[:, row, length].any()
        assert not cache[:, row, max(8, length + 1) :].any()
    again, nothing = steps(state)
    assert (nothing.tokens == NO_TOKEN).all()
    assert again.positions.tolist() == [8, 2, 5, 1]


def test_a_stop_token_finishes_its_sequence_and_is_output():
    """The checkpoint's stop tokens, unless ignored, and those of the request."""
    to_end = GREEDY.replace(logit_bias={END: 100.0})
    own = GREEDY.replace(logit_bias={9: 100.0}, stop_token_ids=[9], ignore_eos=True)
    state, first = started([to_end, to_end.replace(ignore_eos=True), own, GREEDY])
    assert first.tokens[:, 0].tolist() == [END, END, 9, NO_TOKEN]
    assert state.done.tolist() == [True, False, True, True]


def test_a_limit_is_data_and_never_passes_the_buffer():
    state, _ = started()
    before = _jit_decode(None)._cache_size()
    for limit in (0, 1, 3, STEPS, 10**6):
        state, more = steps(state, limit)
        counts = (np.asarray(more.tokens) != NO_TOKEN).sum(axis=1).tolist()
        assert counts == [min(limit, STEPS)] * 3 + [0]
    assert _jit_decode(None)._cache_size() <= before + 1


def test_without_logprobs_there_are_none():
    state, first = started(GREEDY.replace(logprobs=None))
    assert (first.logprobs, first.top_ids, first.top_logprobs) == (None, None, None)
    _, more = steps(state)
    assert (more.logprobs, more.top_ids, more.top_logprobs) == (None, None, None)
    np.testing.assert_array_equal(generated(first, more), generated(*_run(started())))


def test_only_sequences_with_broken_logits_are_marked():
    _, logits = prefill()
    broken = logits.at[1, 3].set(jnp.nan).at[3].set(jnp.inf)
    state, first = started(logits=broken)
    assert state.finite.tolist() == [True, False, True, True], "padding of the batch does not count"
    assert 0 <= int(first.tokens[1, 0]) < VOCAB
    state, _ = steps(state)
    assert state.finite.tolist() == [True, False, True, True], "the flag stays"


def test_penalties_remember_across_calls():
    params = GREEDY.replace(presence_penalty=2, repetition_penalty=100)
    tokens = generated(*_run(started(params)))
    assert all(len(set(row)) == len(row) for row in tokens[:3].tolist())


def test_donated_arrays_are_deleted():
    cache, logits = new_cache(), jnp.zeros((4, VOCAB), jnp.float32)
    after, own = prefill_chunk(MODEL, SMALL.params, cache, logits, block(), np.int32(0), LENGTHS)
    assert cache.data.is_deleted()
    assert logits.is_deleted()
    is_padding = np.asarray([False] * 3 + [True])
    state, _ = start_decode(after, own, LENGTHS, np.asarray([20] * 4, np.int32), is_padding, sampler(GREEDY))
    assert after.data.is_deleted()
    later, _ = steps(state)
    assert state.cache.data.is_deleted()
    assert not later.cache.data.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(SMALL.params))


def test_the_host_can_mark_a_sequence_as_finished():
    state, _ = started()
    state = replace(state, done=state.done | np.asarray([False, True, False, False]))
    _, more = steps(state)
    assert (np.asarray(more.tokens) != NO_TOKEN).sum(axis=1).tolist() == [STEPS, 0, STEPS, 0]
