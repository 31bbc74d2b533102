"""Requests against their definition, for random texts, tokens, stop strings and chunk sizes."""

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.engine.outputs import TokenLogprob
from glm_jax.engine.request import Request
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer
from tests.text.fixtures import write_byte_level_tokenizer

END = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = write_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return Tokenizer.from_file(path, model_vocab=384)


def make_request(tokenizer, stop=(), budget=1000):
    params = SamplingParams(stop=stop, max_tokens=budget)
    return Request(
        tokenizer=tokenizer,
        prompt_ids=(1,),
        params=params,
        seed=0,
        max_new_tokens=budget,
        stop_ids=frozenset([END, END + 1]),
    )


def expected_completion(tokenizer, ids, stops, budget):
    """Text, number of tokens and finish reason by definition: tries one prefix of the tokens after the other."""
    data = b""
    for count, token in enumerate(ids, 1):
        ends = "stop" if token in (END, END + 1) else "length" if count == budget else None
        data += b"" if token in (END, END + 1) else tokenizer.token_bytes(token, skip_special=True) or b""
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=ends is not None)
        matches = [at for stop in stops if (at := text.find(stop)) >= 0]
        if matches:
            return text[: min(matches)], count, "stop"
        if ends:
            return text, count, ends
    return None


LETTERS = "ab€🙂"
texts = st.text(LETTERS, max_size=14)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3).map(tuple)
chunk_sizes = st.lists(st.integers(1, 5), max_size=40)


@given(
    texts=st.lists(texts, max_size=4),
    single_bytes=st.lists(st.integers(0, 255)),
    stops=stop_lists,
    sizes=chunk_sizes,
    data=st.data(),
)
def test_any_tokens_in_chunks_of_any_size(tokenizer, texts, single_bytes, stops, sizes, data):
    """Whole tokens, single bytes, which may be no character, and whole characters split into bytes."""
    whole = [token for text in texts for token in tokenizer.encode(text)]
    split = [byte_id(tokenizer, byte) for text in texts for byte in text.encode()]
    broken = [byte_id(tokenizer, byte) for byte in single_bytes]
    ids = [*data.draw(st.sampled_from([whole, split, split + broken + whole])), END]
    budget = data.draw(st.integers(1, len(ids) + 1))
    text, count, reason = expected_completion(tokenizer, ids, stops, budget)

    request, shown, at = make_request(tokenizer, stops, budget), "", 0
    for size in [*sizes, len(ids)]:
        chunk = request.append_tokens(ids[at : at + size])
        if request.finish_reason is None:
            assert text.startswith(shown + (chunk.text if chunk else ""))
        if chunk:
            shown += chunk.text
        at += size
        if request.finish_reason:
            break
    assert (shown, len(request.token_ids), request.finish_reason) == (text, count, reason)
    assert chunk.completion == request.to_completion()
    assert request.to_completion().text == text
    assert request.append_tokens(ids) is None, "a finished request accepts no more tokens"


def byte_id(tokenizer, byte):
    return next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))


def test_a_chunk_has_its_tokens_and_logprobs(tokenizer):
    request = Request(
        tokenizer=tokenizer,
        prompt_ids=(1, 2),
        params=SamplingParams(logprobs=0),
        seed=5,
        max_new_tokens=3,
        stop_ids=frozenset(),
        index=2,
    )
    entries = [TokenLogprob(token, -1.0) for token in (65, 66, 67, 68)]
    first, second = request.append_tokens([65], entries[:1]), request.append_tokens([66, 67, 68], entries[1:])
    assert (first.token_ids, second.token_ids) == ((65,), (66, 67))
    assert (first.index, first.finish_reason, second.finish_reason) == (2, None, "length")
    assert second.completion.logprobs == tuple(entries[:3])
    assert (second.completion.prompt_tokens, second.completion.seed) == (2, 5)


def test_no_new_tokens_give_no_chunk(tokenizer):
    assert make_request(tokenizer).append_tokens([]) is None
