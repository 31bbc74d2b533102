"""Completions and answers on stdout, as text or as JSON, and a conversation at the terminal. Imports no JAX."""

from __future__ import annotations

import codecs
import dataclasses
import json
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

from glm_jax.cli.common import INTERRUPTED, OK
from glm_jax.engine.chat import ChatStream
from glm_jax.engine.outputs import ChatCompletion, Completion
from glm_jax.errors import PromptError

_DIM, _PLAIN = "\033[2m", "\033[0m"

Turn = dict[str, str]


def show_text(pieces: Generator[str]) -> int:
    """Prints pieces as they come; Ctrl-C ends them. Returns the exit code."""
    code = OK
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        pieces.close()
    print(flush=True)
    return code


class Answer:
    """Prints an answer as it comes: the thinking (dimmed, on a terminal), an empty line, the content.

    Attributes:
        content: what was printed of it.
    """

    def __init__(self, stream: ChatStream) -> None:
        self.content = ""
        self._stream = stream
        self._dims = sys.stdout.isatty()
        self._thinks = False
        self._dimmed = False

    def show(self) -> int:
        """Prints all of it, or until Ctrl-C. Returns the exit code."""
        return show_text(self._pieces())

    def _pieces(self) -> Generator[str]:
        try:
            for delta in self._stream:
                if delta.reasoning:
                    yield self._begin_thinking() + delta.reasoning
                if delta.content:
                    self.content += delta.content
                    yield self._end_thinking() + delta.content
        finally:
            # Also after Ctrl-C in the middle of printing: the terminal must not stay dim.
            if self._dimmed:
                print(_PLAIN, end="", flush=True)

    def _begin_thinking(self) -> str:
        mark = _DIM if self._dims and not self._thinks else ""
        self._thinks, self._dimmed = True, self._dims
        return mark

    def _end_thinking(self) -> str:
        if not self._thinks:
            return ""
        self._thinks = False
        return (_PLAIN if self._dims else "") + "\n\n"


def show_whole(done: Completion | Sequence[Completion], *, as_json: bool) -> None:
    """Prints completions: one JSON object a line, or the texts, with a line on stderr before each of several."""
    several = done if isinstance(done, Sequence) else [done]
    for number, completion in enumerate(several, 1):
        if as_json:
            # Escaped where the terminal or file could not hold the characters.
            utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
            print(json.dumps(record(completion), ensure_ascii=not utf8), flush=True)
            continue
        if len(several) > 1:
            print(f"--- {number} of {len(several)}, seed {completion.seed}", file=sys.stderr, flush=True)
        print(completion.text, flush=True)


def record(completion: Completion) -> dict[str, Any]:
    """A completion as JSON has it."""
    made: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "seed": completion.seed,
    }
    if completion.logprobs is not None:
        made["logprobs"] = [dataclasses.asdict(entry) for entry in completion.logprobs]
    if isinstance(completion, ChatCompletion):
        made |= {
            "content": completion.content,
            "reasoning": completion.reasoning,
            "tool_calls": [dataclasses.asdict(call) for call in completion.tool_calls],
        }
    return made


def talk(answer: Callable[[list[Turn]], str | None], turns: Sequence[Turn]) -> int:
    """A conversation, until Ctrl-D (or Ctrl-C at the prompt).

    Args:
        answer: prints the answer to a conversation and returns its text; None takes the question back.
        turns: what comes before the first question.
    """
    print("Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr, flush=True)
    turns = list(turns)
    while True:
        try:
            said = _ask()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return OK
        if not said.strip():
            continue
        question: Turn = {"role": "user", "content": said}
        try:
            content = answer([*turns, question])
        except PromptError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if content:
            turns += [question, {"role": "assistant", "content": content}]


def _ask() -> str:
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # stdout holds the answers alone
        return input()
    except UnicodeDecodeError:
        print("error: what was typed is not UTF-8", file=sys.stderr, flush=True)
        return ""
