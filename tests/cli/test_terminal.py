"""Completions, chat answers and conversations at the terminal, with scripted models and input."""

import builtins
import io
import json
import re
import sys

import pytest

from glm_jax.cli import terminal
from glm_jax.engine.outputs import ChatCompletion, Completion, TokenLogprob
from glm_jax.errors import GlmError, PromptError
from glm_jax.text import Delta, Message

DIM, PLAIN = "\033[2m", "\033[0m"


class Screen(io.StringIO):
    """A terminal; Ctrl-C arrives just after it has shown `interrupt_at`, in the middle of a print."""

    encoding = "utf-8"

    def __init__(self, is_terminal=True, interrupt_at=None):
        super().__init__()
        self.is_terminal, self.interrupt_at = is_terminal, interrupt_at

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        written = super().write(text)
        if self.interrupt_at is not None and self.interrupt_at in text:
            self.interrupt_at = None
            raise KeyboardInterrupt
        return written


@pytest.fixture
def screen(monkeypatch):
    def screen(**options):
        made = Screen(**options)
        monkeypatch.setattr(sys, "stdout", made)
        return made

    return screen


def deltas(*given, interrupted=False):
    yield from given
    if interrupted:
        raise KeyboardInterrupt


ANSWER = (Delta(reasoning="Let "), Delta(reasoning="me."), Delta(content="It is "), Delta(content="7."))


def test_thinking_is_dimmed_on_a_terminal(screen):
    shown, answer = screen(), terminal.ChatPrinter(deltas(*ANSWER))
    assert answer.print_all() == 0
    assert shown.getvalue() == f"{DIM}Let me.{PLAIN}\n\nIt is 7.{PLAIN}\n"
    assert answer.content == "It is 7."


def test_a_file_has_no_escape_sequences(screen):
    shown, answer = screen(is_terminal=False), terminal.ChatPrinter(deltas(*ANSWER))
    assert answer.print_all() == 0
    assert shown.getvalue() == "Let me.\n\nIt is 7.\n"


def test_an_answer_without_thinking_is_not_dimmed(screen):
    shown = screen()
    assert terminal.ChatPrinter(deltas(*ANSWER[2:])).print_all() == 0
    assert shown.getvalue() == "It is 7.\n"


@pytest.mark.parametrize("count", range(5))
def test_ctrl_c_while_the_model_works_leaves_the_terminal_as_it_was(screen, count):
    shown, answer = screen(), terminal.ChatPrinter(deltas(*ANSWER[:count], interrupted=True))
    assert answer.print_all() == 130
    assert as_left(shown.getvalue()) == PLAIN
    assert shown.getvalue().endswith("\n")
    assert answer.content == "".join(delta.content for delta in ANSWER[:count])


@pytest.mark.parametrize("at", ["Let ", "me.", "It is ", "7."])
def test_ctrl_c_while_printing_leaves_the_terminal_as_it_was(screen, at):
    shown, answer = screen(interrupt_at=at), terminal.ChatPrinter(deltas(*ANSWER))
    assert answer.print_all() == 130
    assert answer.content == "It is 7."[: "It is 7.".find(at) + len(at) if at in "It is 7." else 0]
    assert as_left(shown.getvalue()) == PLAIN
    assert at in shown.getvalue()
    assert shown.getvalue().endswith("\n")


def as_left(text):
    """The last escape sequence on the screen."""
    return re.findall(r"\x1b\[\dm", PLAIN + text)[-1]


def test_an_error_in_the_middle_leaves_the_terminal_as_it_was(screen):
    def broken():
        yield Delta(reasoning="Let ")
        raise GlmError("NaN")

    shown = screen()
    with pytest.raises(GlmError):
        terminal.ChatPrinter(broken()).print_all()
    assert as_left(shown.getvalue()) == PLAIN


def test_text_ends_with_a_line_end(capsys):
    assert terminal.print_stream(piece for piece in ("def ", "fib")) == 0
    assert capsys.readouterr().out == "def fib\n"


DONE = Completion("naïve 🙂", (3, 4), "stop", 7, 2)
LOGPROBS = Completion("a", (3,), "length", 7, 2, (TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.0))),))
CHAT = ChatCompletion("x</think>y", (3, 4), "stop", 7, 2, message=Message("x", "y", [], "stop"))


def test_whole_texts(capsys):
    terminal.print_completions(DONE, as_json=False)
    assert capsys.readouterr() == ("naïve 🙂\n", "")
    terminal.print_completions([DONE, LOGPROBS], as_json=False)
    assert capsys.readouterr() == ("naïve 🙂\na\n", "--- 1 of 2, seed 7\n--- 2 of 2, seed 7\n")


def test_json_is_one_object_a_line(capsys):
    terminal.print_completions([DONE, LOGPROBS, CHAT], as_json=True)
    out, err = capsys.readouterr()
    assert err == ""
    first, second, third = map(json.loads, out.splitlines())
    common = {"finish_reason": "stop", "prompt_tokens": 2, "completion_tokens": 2, "seed": 7, "token_ids": [3, 4]}
    assert first == {"text": "naïve 🙂", **common}
    assert second["logprobs"] == [{"token_id": 3, "logprob": -0.5, "top": [[3, -0.5], [4, -1.0]]}]
    assert third == {"text": "x</think>y", **common, "content": "y", "reasoning": "x", "tool_calls": []}


def test_json_is_escaped_where_stdout_is_not_utf8(monkeypatch):
    for encoding, escaped in (("utf-8", False), ("UTF8", False), ("latin-1", True), ("ascii", True)):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        terminal.print_completions(DONE, as_json=True)
        assert json.loads(raw.getvalue().decode(encoding))["text"] == DONE.text
        assert (b"\\u" in raw.getvalue()) == escaped


class Talk:
    """A conversation in which a user types `typed`; by default each answer is the number of the call."""

    def __init__(self, monkeypatch, typed, answer=None):
        lines = iter(typed)
        self.seen, self.answer = [], answer or (lambda calls: str(len(calls)))

        def read(prompt=""):
            print(prompt, end="")
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)

    def run(self, turns=()):
        def reply(turns):
            self.seen.append([(turn["role"], turn["content"]) for turn in turns])
            return self.answer(self.seen)

        return terminal.run_conversation(reply, turns)


def test_a_conversation_keeps_its_messages(monkeypatch, capsys):
    talk = Talk(monkeypatch, ["first", "", "  ", "second"])
    assert talk.run([{"role": "system", "content": "be brief"}]) == 0
    system, first = ("system", "be brief"), ("user", "first")
    assert talk.seen == [[system, first], [system, first, ("assistant", "1"), ("user", "second")]]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Ctrl-C ends an answer, Ctrl-D the conversation.\n> ")


def test_the_prompt_is_on_stdout_only_on_a_terminal(monkeypatch, screen):
    shown = screen()
    Talk(monkeypatch, ["first"]).run()
    assert shown.getvalue() == "> > "


def test_ctrl_c_at_the_prompt_ends_it(monkeypatch):
    talk = Talk(monkeypatch, ["first", KeyboardInterrupt, "never"])
    assert talk.run() == 0
    assert len(talk.seen) == 1


def test_a_question_without_an_answer_is_dropped(monkeypatch, capsys):
    def answer(calls):
        if len(calls) == 1:
            raise PromptError("too long")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [None, "", "yes", "."][len(calls) - 3]

    talk = Talk(monkeypatch, ["a", "b", "c", "d", "e", "f"], answer)
    assert talk.run() == 0
    questions = [calls[-1][1] for calls in talk.seen]
    assert questions == ["a", "b", "c", "d", "e", "f"]
    assert [len(calls) for calls in talk.seen] == [1, 1, 1, 1, 1, 3]
    assert "error: too long\n" in capsys.readouterr().err


def test_typed_text_that_is_not_utf8_is_reported(monkeypatch, capsys):
    talk = Talk(monkeypatch, [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "good"])
    assert talk.run() == 0
    assert talk.seen == [[("user", "good")]]
    assert "error: the typed text is not UTF-8\n" in capsys.readouterr().err


def test_a_model_that_fails_ends_it(monkeypatch):
    def answer(calls):
        raise GlmError("NaN")

    with pytest.raises(GlmError):
        Talk(monkeypatch, ["a"], answer).run()
