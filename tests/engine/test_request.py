"""One completion as the host sees it, against its definition, for random texts, tokens, stop strings and bursts."""

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.engine.request import Request
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer
from tests.text.fixtures import write_byte_level_tokenizer

END = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = write_byte_level_tokenizer(tmp_path_factory.mktemp("rows") / "tokenizer.json")
    return Tokenizer.from_file(path, model_vocab=384)


def row_of(tokenizer, stop=(), budget=1000):
    params = SamplingParams(stop=stop, max_tokens=budget)
    return Request(
        tokenizer=tokenizer,
        prompt_ids=(1,),
        params=params,
        seed=0,
        max_new_tokens=budget,
        stop_ids=frozenset([END, END + 1]),
    )


def defined(tokenizer, ids, stops, budget):
    """Text, number of tokens and reason: the first token that ends it, looked for one prefix at a time."""
    data = b""
    for count, token in enumerate(ids, 1):
        ends = "stop" if token in (END, END + 1) else "length" if count == budget else None
        data += b"" if token in (END, END + 1) else tokenizer.token_bytes(token, skip_special=True) or b""
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=ends is not None)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], count, "stop"
        if ends:
            return text, count, ends
    return None


LETTERS = "ab€🙂"
texts = st.text(LETTERS, max_size=14)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3).map(tuple)
bursts = st.lists(st.integers(1, 5), max_size=40)


@given(
    texts=st.lists(texts, max_size=4),
    loose=st.lists(st.integers(0, 255)),
    stops=stop_lists,
    sizes=bursts,
    data=st.data(),
)
def test_any_tokens_in_any_bursts(tokenizer, texts, loose, stops, sizes, data):
    """Whole tokens, single bytes (of broken characters too), and the bytes of whole characters in pieces."""
    whole = [token for text in texts for token in tokenizer.encode(text)]
    split = [byte_id(tokenizer, byte) for text in texts for byte in text.encode()]
    broken = [byte_id(tokenizer, byte) for byte in loose]
    ids = [*data.draw(st.sampled_from([whole, split, split + broken + whole])), END]
    budget = data.draw(st.integers(1, len(ids) + 1))
    text, count, reason = defined(tokenizer, ids, stops, budget)

    row, shown, at = row_of(tokenizer, stops, budget), "", 0
    for size in [*sizes, len(ids)]:
        piece = row.append_tokens(ids[at : at + size])
        if row.finish_reason is None:
            assert text.startswith(shown + (piece.text if piece else ""))
        if piece:
            shown += piece.text
        at += size
        if row.finish_reason:
            break
    assert (shown, len(row.token_ids), row.finish_reason) == (text, count, reason)
    assert piece.completion == row.to_completion()
    assert row.to_completion().text == text
    assert row.append_tokens(ids) is None, "a row that has ended takes nothing more"


def byte_id(tokenizer, byte):
    return next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))


def test_a_piece_carries_its_tokens_and_logprobs(tokenizer):
    from glm_jax.engine.outputs import TokenLogprob

    row = Request(
        tokenizer=tokenizer,
        prompt_ids=(1, 2),
        params=SamplingParams(logprobs=0),
        seed=5,
        max_new_tokens=3,
        stop_ids=frozenset(),
        index=2,
    )
    entries = [TokenLogprob(token, -1.0) for token in (65, 66, 67, 68)]
    first, second = row.append_tokens([65], entries[:1]), row.append_tokens([66, 67, 68], entries[1:])
    assert (first.token_ids, second.token_ids) == ((65,), (66, 67))
    assert (first.index, first.finish_reason, second.finish_reason) == (2, None, "length")
    assert second.completion.logprobs == tuple(entries[:3])
    assert (second.completion.prompt_tokens, second.completion.seed) == (2, 5)


def test_nothing_new_gives_no_piece(tokenizer):
    assert row_of(tokenizer).append_tokens([]) is None
