"""The miniature's tokenizer: GLM's special tokens, lossless round trips, reproducible training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_recipe.corpus import library_files
from examples.tiny_recipe.tokenizer import (
    LEARNED_VOCAB,
    MODEL_VOCAB,
    NON_SPECIAL_TOKENS,
    SPECIAL_TOKENS,
    train_tokenizer,
)


@given(text=st.text())
def test_text_round_trips(tiny_tokenizer, text):
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_library_files_round_trip(tiny_tokenizer):
    for file in library_files()[::50]:
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(file.text).ids, skip_special_tokens=False) == file.text


def test_special_tokens_come_last_in_the_order_of_the_original(tiny_tokenizer):
    assert len(SPECIAL_TOKENS) == 36
    assert [tiny_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(
        range(LEARNED_VOCAB, LEARNED_VOCAB + 36)
    )
    assert tiny_tokenizer.get_vocab_size() <= MODEL_VOCAB
    assert MODEL_VOCAB % 256 == 0


def test_tags_are_kept_when_special_tokens_are_skipped(tiny_tokenizer):
    assert {
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    } == NON_SPECIAL_TOKENS
    text = "<|user|><think>a</think><tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value></tool_call><|observation|>"
    kept = tiny_tokenizer.decode(tiny_tokenizer.encode(text).ids, skip_special_tokens=True)
    assert kept == text.removeprefix("<|user|>").removesuffix("<|observation|>")


@given(number=st.integers(0, 10**12))
def test_each_digit_is_a_token(tiny_tokenizer, number):
    assert tiny_tokenizer.encode(str(number)).tokens == list(str(number))


def test_the_same_texts_give_the_same_tokenizer():
    texts = [file.text for file in library_files() if file.name.startswith(("json/", "email/", "asyncio/", "http/"))]
    first, second = train_tokenizer(texts), train_tokenizer(texts)
    assert first.to_str() == second.to_str()


def test_too_little_text_is_rejected():
    with pytest.raises(RuntimeError, match="too small"):
        train_tokenizer(["abc"])
