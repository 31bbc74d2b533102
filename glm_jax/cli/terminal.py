"""Prints completions and chat answers as text or JSON, and holds a conversation at the terminal. Imports no JAX."""

from __future__ import annotations

import codecs
import dataclasses
import json
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from glm_jax.cli.common import INTERRUPTED, OK
from glm_jax.engine.outputs import ChatCompletion, Completion
from glm_jax.errors import PromptError
from glm_jax.text import Delta

_DIM, _RESET = "\033[2m", "\033[0m"

MessageDict = dict[str, str]


def print_stream(chunks: Generator[str]) -> int:
    """Prints text as it is generated, until its end or Ctrl-C; returns the exit code."""
    code = OK
    try:
        for text in chunks:
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        chunks.close()
    print(flush=True)
    return code


class ChatPrinter:
    """Prints an answer as it is generated: the reasoning (dimmed on a terminal), an empty line, the content.

    Attributes:
        content: Content printed so far.
    """

    def __init__(self, deltas: Iterable[Delta]) -> None:
        self.content = ""
        self._deltas = deltas
        self._use_dim = sys.stdout.isatty()
        self._in_reasoning = False
        self._is_dimmed = False

    def print_all(self) -> int:
        """Prints the answer until its end or Ctrl-C; returns the exit code."""
        return print_stream(self._iter_text())

    def _iter_text(self) -> Generator[str]:
        try:
            for delta in self._deltas:
                if delta.reasoning:
                    yield self._begin_reasoning() + delta.reasoning
                if delta.content:
                    self.content += delta.content
                    yield self._end_reasoning() + delta.content
        finally:
            # Runs after Ctrl-C in the middle of printing too: the terminal must not stay dim.
            if self._is_dimmed:
                print(_RESET, end="", flush=True)

    def _begin_reasoning(self) -> str:
        escape = _DIM if self._use_dim and not self._in_reasoning else ""
        self._in_reasoning, self._is_dimmed = True, self._use_dim
        return escape

    def _end_reasoning(self) -> str:
        if not self._in_reasoning:
            return ""
        self._in_reasoning = False
        return (_RESET if self._use_dim else "") + "\n\n"


def print_completions(completions: Completion | Sequence[Completion], *, as_json: bool) -> None:
    """Prints completions: one JSON object per line, or texts, each of several with a heading on stderr."""
    completions = completions if isinstance(completions, Sequence) else [completions]
    for number, completion in enumerate(completions, 1):
        if as_json:
            # Only a UTF-8 stdout can hold every character.
            utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
            print(json.dumps(completion_to_json(completion), ensure_ascii=not utf8), flush=True)
            continue
        if len(completions) > 1:
            print(f"--- {number} of {len(completions)}, seed {completion.seed}", file=sys.stderr, flush=True)
        print(completion.text, flush=True)


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """A completion as a JSON object."""
    record: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "seed": completion.seed,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [dataclasses.asdict(entry) for entry in completion.logprobs]
    if isinstance(completion, ChatCompletion):
        record |= {
            "content": completion.content,
            "reasoning": completion.reasoning,
            "tool_calls": [dataclasses.asdict(call) for call in completion.tool_calls],
        }
    return record


def run_conversation(reply: Callable[[list[MessageDict]], str | None], messages: Sequence[MessageDict]) -> int:
    """Holds a conversation until Ctrl-D, or Ctrl-C at the prompt; returns the exit code.

    Args:
        reply: Prints the answer to a conversation and returns its content. Without content, the question is dropped
            from the conversation.
        messages: Messages before the first question.
    """
    print("Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr, flush=True)
    messages = list(messages)
    while True:
        try:
            text = _read_user_input()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return OK
        if not text.strip():
            continue
        question: MessageDict = {"role": "user", "content": text}
        try:
            content = reply([*messages, question])
        except PromptError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if content:
            messages += [question, {"role": "assistant", "content": content}]


def _read_user_input() -> str:
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # stdout holds only the answers
        return input()
    except UnicodeDecodeError:
        print("error: the typed text is not UTF-8", file=sys.stderr, flush=True)
        return ""
