"""The tokenizer: round trips, streaming, special tokens, damaged files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.errors import CheckpointError, PromptError
from glm_jax.text import Tokenizer
from glm_jax.text.tokenizer import MAX_TEXT_LENGTH, StreamDecoder
from tests.text.fixtures import (
    GLM_SPECIAL_TOKENS,
    TAG_TOKENS,
    write_byte_fallback_tokenizer,
    write_byte_level_tokenizer,
)

MODEL_VOCAB = 352
TRICKY = [
    "",
    " ",
    "\n\n",
    "天气",
    "🙂",
    "👨‍👩‍👧",
    "e\u0301",
    "<think>",
    "</tool_call>",
    "<|user|>",
    "\ufffd",
    "\x00",
    "\u2028",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_level_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_dir(folder, model_vocab=MODEL_VOCAB)


@pytest.fixture(scope="module")
def hf_tokenizer(folder) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory) -> Tokenizer:
    path = write_byte_fallback_tokenizer(tmp_path_factory.mktemp("fallback") / "tokenizer.json")
    return Tokenizer.from_file(path, model_vocab=300)


texts = st.lists(st.sampled_from(TRICKY) | st.text(max_size=10), max_size=6).map("".join)
id_lists = st.lists(st.integers(0, MODEL_VOCAB - 1), max_size=40)


@given(text=texts)
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@given(ids=id_lists, skip=st.booleans())
def test_decoding_equals_the_tokenizers_package(tokenizer, hf_tokenizer, ids, skip):
    assert tokenizer.decode(ids, skip_special=skip) == hf_tokenizer.decode(ids, skip_special_tokens=skip)


def pieces_of(decoder: StreamDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.feed(i) for i in ids), decoder.flush()]


@given(ids=id_lists, skip=st.booleans())
def test_pieces_joined_are_the_whole(tokenizer, ids, skip):
    assert "".join(pieces_of(tokenizer.stream(skip), ids)) == tokenizer.decode(ids, skip)


@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_no_piece_has_half_a_character(tokenizer, text):
    pieces = pieces_of(tokenizer.stream(skip_special=False), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not [piece for piece in pieces if "\ufffd" in piece]


def test_a_character_comes_with_its_last_byte(tokenizer, hf_tokenizer):
    byte_ids = [hf_tokenizer.token_to_id(character) for character in "ðŁĻĤ"]  # the four bytes of U+1F642
    assert pieces_of(tokenizer.stream(), byte_ids) == ["", "", "", "🙂", ""]
    assert pieces_of(tokenizer.stream(), byte_ids[:3]) == ["", "", "", "\ufffd"]
    assert pieces_of(tokenizer.stream(), [*byte_ids[:2], hf_tokenizer.token_to_id("a")]) == ["", "", "\ufffda", ""]


def test_a_skipped_token_does_not_break_a_character(tokenizer, hf_tokenizer):
    byte_ids = [hf_tokenizer.token_to_id(character) for character in "Ã©"]
    ids = [byte_ids[0], tokenizer.token_to_id("<|user|>"), byte_ids[1]]
    assert "".join(pieces_of(tokenizer.stream(), ids)) == tokenizer.decode(ids) == "é"


def test_each_id_is_decoded_once_and_few_bytes_are_buffered(tokenizer, monkeypatch):
    decoded = []
    token_bytes = Tokenizer.token_bytes
    monkeypatch.setattr(
        Tokenizer, "token_bytes", lambda self, i, skip=False: decoded.append(i) or token_bytes(self, i, skip)
    )
    decoder = tokenizer.stream()
    ids = list(np.random.default_rng(0).integers(0, 256, size=2000))
    for token_id in ids:
        decoder.feed(token_id)
        assert len(decoder._utf8.getstate()[0]) <= 3
    assert decoded == ids


def test_special_tokens_in_text_are_recognized_and_none_is_added(tokenizer):
    ids = tokenizer.encode("[gMASK]<sop><|user|>hi<|assistant|><think>")
    names = ["[gMASK]", "<sop>", "<|user|>", None, "<|assistant|>", "<think>"]
    known = [tokenizer.token_to_id(name) for name in names if name]
    assert [i for i in ids if i in known] == known
    assert ids[0] == known[0]
    assert tokenizer.encode("") == []


def test_tags_are_kept_when_special_tokens_are_skipped(tokenizer):
    text = "<think>a</think>b<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>"
    ids = tokenizer.encode(text + "<|observation|>")
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=False) == text + "<|observation|>"
    assert tokenizer.special_ids == {tokenizer.token_to_id(name) for name in GLM_SPECIAL_TOKENS}


def test_tags_are_kept_even_if_the_file_marks_them_special(tmp_path):
    marked = Tokenizer.from_file(
        write_byte_level_tokenizer(tmp_path / "t.json", tags_are_special=True), model_vocab=MODEL_VOCAB
    )
    assert marked.decode(marked.encode("".join(TAG_TOKENS))) == "".join(TAG_TOKENS)
    assert not marked.special_ids & {marked.token_to_id(tag) for tag in TAG_TOKENS}


def test_unused_ids(tokenizer):
    assert tokenizer.vocab_size == 320 + len(GLM_SPECIAL_TOKENS) + len(TAG_TOKENS)
    assert tokenizer.unused_ids == tuple(range(tokenizer.vocab_size, MODEL_VOCAB))
    assert tokenizer.decode(tokenizer.unused_ids) == ""
    assert tokenizer.token_bytes(MODEL_VOCAB - 1) is None
    assert tokenizer.token_to_id("no such token") is None


@pytest.mark.parametrize("token_id", [-1, MODEL_VOCAB, 2**40])
def test_ids_outside_the_vocabulary_are_rejected(tokenizer, token_id):
    for use in (lambda: tokenizer.decode([0, token_id]), lambda: tokenizer.stream().feed(token_id)):
        with pytest.raises(PromptError, match=f"token id {token_id} is outside the model's vocabulary, 0 to 351"):
            use()


def test_arrays_of_ids_decode(tokenizer):
    ids = tokenizer.encode("return n")
    assert tokenizer.decode(np.asarray(ids, np.int32)) == "return n"


@given(text=st.text("ab é🙂\n", max_size=20))
def test_byte_fallback_round_trips(fallback, text):
    ids = fallback.encode(text)
    assert fallback.decode(ids) == text
    assert "".join(pieces_of(fallback.stream(), ids)) == text


@given(ids=st.lists(st.integers(0, 299), max_size=30), skip=st.booleans())
def test_byte_fallback_pieces_joined_are_the_whole(fallback, ids, skip):
    assert "".join(pieces_of(fallback.stream(skip), ids)) == fallback.decode(ids, skip)


def test_words_without_a_decoder_are_joined_by_spaces(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[x]": 2}, unk_token="a"))
    words.add_special_tokens(["[x]"])
    words.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_dir(tmp_path, model_vocab=3)
    for ids in ([], [0], [0, 1, 2, 1], [2, 0, 0]):
        assert ours.decode(ids) == words.decode(ids) == "".join(pieces_of(ours.stream(), ids))


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path):
    path = write_byte_level_tokenizer(tmp_path / "tokenizer.json")
    changed = tokenizers.Tokenizer.from_file(str(path))
    changed.enable_padding(length=50)
    changed.enable_truncation(max_length=2)
    changed.save(str(path))
    ids = Tokenizer.from_file(path, model_vocab=MODEL_VOCAB).encode("1 2 3 4 5 6")
    assert 2 < len(ids) < 50


def test_a_lone_surrogate_is_one_clear_error(tokenizer):
    with pytest.raises(PromptError, match=r"not valid Unicode: character 2 is the lone surrogate U\+DC9F"):
        tokenizer.encode(b"ab\x9f".decode("utf-8", "surrogateescape"))


def test_a_huge_text_is_one_clear_error(tokenizer):
    with pytest.raises(PromptError, match=f"{MAX_TEXT_LENGTH + 1:,} characters, and at most {MAX_TEXT_LENGTH:,}"):
        tokenizer.encode("a" * (MAX_TEXT_LENGTH + 1))


def test_a_long_single_word_encodes(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a" * 200_000)) == "a" * 200_000


def test_bytes_are_rejected(tokenizer):
    with pytest.raises(PromptError, match="must be a str, not bytes"):
        tokenizer.encode(b"hello")


def damaged_file(kind: str, good: bytes) -> bytes:
    content = json.loads(good)
    return {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "binary": b"\x80\x04\x95" + good,
        "another JSON": b'{"vocab_size": 154880}',
        "a list": b"[]",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "unknown model": json.dumps(content | {"model": {"type": "Nonsense"}}).encode(),
        "unknown decoder": json.dumps(
            content | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
        ).encode(),
        "deep": b"[" * 100_000,
    }[kind]


MESSAGES = {
    "truncated": "is damaged: it is not complete JSON",
    "empty": "is damaged: it is not complete JSON",
    "binary": "it is not UTF-8 text",
    "another JSON": 'is not a tokenizer: it has no "model"',
    "a list": 'is not a tokenizer: it has no "model"',
    "a pointer": "only a Git LFS pointer",
    "unknown model": "is not a tokenizer that the tokenizers package",
    "unknown decoder": 'step that is not supported: {"type": "WordPiece"',
    "deep": "is damaged: it is not complete JSON",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_an_invalid_file_is_one_clear_error(folder, tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damaged_file(kind, (folder / "tokenizer.json").read_bytes()))
    with pytest.raises(CheckpointError, match=re.escape(MESSAGES[kind])):
        Tokenizer.from_file(path, model_vocab=MODEL_VOCAB)


def test_a_missing_file_is_one_clear_error(tmp_path):
    for missing in (tmp_path, tmp_path / "no such folder"):
        with pytest.raises(CheckpointError, match=r"there is no .*tokenizer.json: copy the checkpoint's"):
            Tokenizer.from_dir(missing, model_vocab=10)
    with pytest.raises(CheckpointError, match="cannot read"):
        Tokenizer.from_file(tmp_path, model_vocab=10)


def test_a_tokenizer_of_a_larger_model_is_rejected(folder):
    with pytest.raises(CheckpointError, match="has token id 335, but the model has only 300 embedding rows"):
        Tokenizer.from_dir(folder, model_vocab=300)
