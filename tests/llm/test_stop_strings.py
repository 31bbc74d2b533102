"""The end of completions: stop strings, stop tokens, end of sequence, and the chunks of a stream at the end."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from glm_jax.engine import runner
from glm_jax.llm import LLM
from glm_jax.sampling import SamplingParams
from tests.builders.llm_checkpoints import write_scripted_model

PIECES = ["one ", "tw", "o th", "ree", "0xE2", "0x82", "0xAC", " four", " fi", "ve"]
TEXT = "one two three€ four five"
GREEDY = SamplingParams(temperature=0, max_tokens=20, seed=0)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Generates TEXT after "x"; after "y" text that ends in half a character."""
    folder: Path = tmp_path_factory.mktemp("stops")
    return LLM.load(write_scripted_model(folder, {"x": PIECES, "y": ["yes", "0xF0", "0x9F"]}), dtype="float32")


def test_the_end_of_sequence_ends_it(writer):
    found = writer.generate("x", GREEDY)
    assert (found.text, found.finish_reason) == (TEXT, "stop")
    assert len(found.token_ids) == len(PIECES) + 1
    assert found.token_ids[-1] in writer.eos_ids


def test_the_checkpoints_files_are_both_read_for_the_ids_that_end(writer):
    expected = [writer.tokenizer.token_to_id(token) for token in ("<|user|>", "<|endoftext|>", "<|observation|>")]
    assert sorted(writer.eos_ids) == sorted(expected)
    assert writer.config.eos_token_ids == (expected[0],)


def test_ignore_eos_goes_on(writer):
    found = writer.generate("x", GREEDY, ignore_eos=True)
    assert (found.completion_tokens, found.finish_reason) == (20, "length")
    assert found.token_ids[:11] == writer.generate("x", GREEDY).token_ids


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_end_it_whatever_becomes_of_eos(writer, ignore_eos):
    token = writer.tokenizer.token_to_id("ree")
    found = writer.generate("x", GREEDY, stop_token_ids=[token], ignore_eos=ignore_eos)
    assert (found.text, found.finish_reason) == ("one two th", "stop")
    assert found.token_ids[-1] == token


def check_stream(llm: LLM, prompt: str, params: SamplingParams, text: str) -> list[str]:
    """The chunks of a stream; checks that they are always a prefix of the final text, and at the end all of it."""
    pieces, shown = list(llm.stream(prompt, params)), ""
    for piece in pieces:
        shown += piece.text
        assert text.startswith(shown)
    assert shown == text
    assert pieces[-1].completion == llm.generate(prompt, params)
    return [piece.text for piece in pieces]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (["two"], "one ", 3),  # cut by a token
        (["o th"], "one tw", 3),  # a whole token
        (["e t", "ne two"], "on", 2),  # whichever is complete first
        (["two", "e two t"], "on", 3),  # complete at once: whichever begins first
        (["two", "tw"], "one ", 2),  # one the beginning of the other
        (["three€ f"], "one two ", 8),  # over a character of three tokens
        (["€"], "one two three", 7),
        (["one "], "", 1),
        (["o"], "", 1),
        (["five"], "one two three€ four ", 10),  # at the very end
        (["five!", "threes", "four  "], TEXT, 11),  # begins and breaks off
        (["x"], TEXT, 11),  # in the prompt only
        (["FIVE"], TEXT, 11),
        ("two", "one ", 3),  # a single string
    ],
    ids=str,
)
def test_stop_strings(writer: LLM, stop: Sequence[str], text: str, tokens: int) -> None:
    params = GREEDY.replace(stop=stop)
    found = writer.generate("x", params)
    assert (found.text, found.finish_reason, found.completion_tokens) == (text, "stop", tokens)
    check_stream(writer, "x", params, text)


def test_a_stream_holds_back_what_may_become_a_stop_string_and_then_shows_it(writer):
    shown = check_stream(writer, "x", GREEDY.replace(stop=["tw three", "ree!"]), TEXT)
    assert shown == ["one ", "", "two th", "", "", "", "ree€", " fou", "r fi", "ve", ""]


def test_a_stream_never_shows_half_a_character(writer):
    shown = check_stream(writer, "x", GREEDY, TEXT)
    assert shown == ["one ", "tw", "o th", "ree", "", "", "€", " four", " fi", "ve", ""]


def test_a_character_that_is_cut_off_is_marked_at_the_end(writer):
    found = writer.generate("y", GREEDY)
    assert (found.text, found.finish_reason) == ("yes\ufffd", "stop")
    assert check_stream(writer, "y", GREEDY, "yes\ufffd") == ["yes", "", "", "\ufffd"]
    cut = writer.generate("y", GREEDY, max_tokens=2)
    assert (cut.text, cut.finish_reason) == ("yes\ufffd", "length")


def test_the_last_token_may_complete_a_stop_string(writer):
    found = writer.generate("x", GREEDY, stop=["two"], max_tokens=3)
    assert (found.text, found.finish_reason) == ("one ", "stop")
    held = writer.generate("x", GREEDY, stop=["two"], max_tokens=2)
    assert (held.text, held.finish_reason) == ("one tw", "length")


def test_each_request_of_a_batch_has_its_own_end(writer):
    found = writer.generate(["x", "y", "x", "y"], GREEDY, stop=["four"])
    assert [c.text for c in found] == ["one two three€ ", "yes\ufffd"] * 2
    assert [c.completion_tokens for c in found] == [8, 4, 8, 4]


def test_sequences_that_ended_at_a_stop_string_are_marked_on_the_device(writer, monkeypatch):
    """Otherwise the device would decode all steps of the call."""
    states = []
    steps = runner.decode_steps
    monkeypatch.setattr(runner, "decode_steps", lambda *a, **k: states.append(a[2].done.tolist()) or steps(*a, **k))
    params = GREEDY.replace(stop=["two"], ignore_eos=True)
    assert [p.index for p in writer.stream("x", params, n=4) if p.finish_reason] == [0, 1, 2, 3]
    assert len(states) == 2
    states.clear()
    found = writer.generate(["x", "y", "x", "y"], params)
    assert [c.completion_tokens for c in found] == [3, 20, 3, 20]
    assert states[-1] == [True, False, True, False]
