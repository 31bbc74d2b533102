"""``python -m glm_jax.generate``: text from a model, on the terminal or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from glm_jax.cli import INTERRUPTED, OK, finish, peak_memory, read_text, set_memory_fraction
from glm_jax.errors import PromptError, SamplingError

if TYPE_CHECKING:
    from glm_jax.completion import Completion
    from glm_jax.llm import LLM

DESCRIPTION = """\
Write text with GLM-4.7-Flash.

Examples:
  python -m glm_jax.generate "def fib(n):"                      the built-in miniature
  python -m glm_jax.generate --chat                             talk to it (Ctrl-D ends)
  python -m glm_jax.generate --chat "What is 3 plus 4?" --no-thinking
  python -m glm_jax.generate --model zai-org/GLM-4.7-Flash --prompt-file question.txt
  cat main.py | python -m glm_jax.generate --model ./converted --temperature 0 --json
"""


@dataclasses.dataclass
class Options:
    """Options of the command; sampling options that are not given come from the checkpoint."""

    prompt: Positional[str | None] = None
    """Text to complete (or, with --chat, the message). Read from stdin when it is piped and no prompt is given."""
    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=4&seed=0"."""
    prompt_file: str | None = None
    """Read the prompt from this file ("-" for stdin)."""
    chat: bool = False
    """Answer a message in the chat format; without a prompt, talk interactively."""
    system: str | None = None
    """System message, with --chat."""
    thinking: bool = True
    """Let the model think before it answers, with --chat."""
    max_tokens: int = 512
    """Longest completion."""
    temperature: float | None = None
    """0 takes the most likely token each time."""
    top_p: float | None = None
    """Keep the most likely tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text."""
    n: int = 1
    """Completions of the prompt."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT")] = ()
    """Strings that end a completion."""
    sampling: str | None = None
    """Any sampling options as JSON, e.g. '{"top_k": 40, "min_p": 0.01, "logprobs": 5}'."""
    json: bool = False
    """Print one JSON object per completion on stdout instead of the text."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations."""
    mesh: int | None = None
    """Number of devices to split the model over."""
    max_model_len: int | None = None
    """Longest prompt and completion together; by default what model and memory allow."""
    memory_fraction: float = 0.95
    """Part of a GPU's memory that JAX may take."""
    check: bool = False
    """Look for NaN and infinite weights while loading."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = tyro.cli(Options, prog="python -m glm_jax.generate", description=DESCRIPTION, args=args)
    params = _sampling(options)
    interactive = options.chat and options.prompt is None and options.prompt_file is None and sys.stdin.isatty()
    prompt = None if interactive else _prompt(options)
    set_memory_fraction(options.memory_fraction)
    from glm_jax.llm import LLM

    llm = LLM.load(
        options.model,
        dtype=options.dtype,
        mesh=options.mesh,
        max_model_len=options.max_model_len or "auto",
        check=options.check,
    )
    if interactive:
        return _talk(llm, options, params)
    code = _once(llm, options, params, prompt or "")
    _closing_line(llm)
    return code


def _sampling(options: Options) -> dict[str, Any]:
    given: dict[str, Any] = {"max_tokens": options.max_tokens, "n": options.n}
    for name in ("temperature", "top_p", "seed"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if options.stop:
        given["stop"] = options.stop
    if options.sampling is not None:
        try:
            given |= json.loads(options.sampling)
        except (ValueError, TypeError) as error:
            raise SamplingError(f"--sampling must be a JSON object: {error}") from None
    from glm_jax.sampling import SamplingParams

    checked = SamplingParams.from_dict(given)  # refuse what is impossible before anything is loaded
    return {name: getattr(checked, name) for name in given}


def _prompt(options: Options) -> str:
    if options.prompt is not None and options.prompt_file is not None:
        raise PromptError("give a prompt or --prompt-file, not both")
    if options.prompt is not None:
        # The shell's bytes reach us as surrogates where they are not UTF-8.
        raw = options.prompt.encode("utf-8", "surrogateescape")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise PromptError("the prompt is not UTF-8") from None
    if options.prompt_file is not None:
        return read_text(options.prompt_file)
    if sys.stdin.isatty():
        raise PromptError('no prompt: give one, as in `python -m glm_jax.generate "def fib(n):"`, or --chat to talk')
    return read_text("-")


def _once(llm: LLM, options: Options, params: dict[str, Any], prompt: str) -> int:
    if options.json or params["n"] > 1:
        done = _messages(llm, options, params, prompt) if options.chat else llm.generate(prompt, **params)
        for completion in done if isinstance(done, list) else [done]:
            print(json.dumps(_record(completion), ensure_ascii=False) if options.json else completion.text)
        return OK
    if options.chat:
        return _show(_answer(llm, options, params, _conversation(options, prompt)))[0]
    return _show(piece.text for piece in llm.stream(prompt, **params))[0]


def _messages(llm: LLM, options: Options, params: dict[str, Any], prompt: str) -> Any:
    return llm.chat(_conversation(options, prompt), enable_thinking=options.thinking, **params)


def _conversation(options: Options, prompt: str) -> list[dict[str, str]]:
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": prompt}]


def _answer(llm: LLM, options: Options, params: dict[str, Any], messages: list[dict[str, str]]) -> Iterator[str]:
    """The answer as text for a terminal: thinking first, dimmed where colours are shown."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    thinking = False
    for delta in llm.chat(messages, stream=True, enable_thinking=options.thinking, **params):
        if delta.reasoning:
            yield delta.reasoning if thinking else dim + delta.reasoning
            thinking = True
        if delta.content:
            yield (f"{plain}\n\n" if thinking else "") + delta.content
            thinking = False
    if thinking:
        yield plain


def _show(pieces: Iterator[str]) -> tuple[int, str]:
    """Prints pieces as they come; Ctrl-C ends them. Returns the exit code and the text."""
    shown: list[str] = []
    code = OK
    try:
        for piece in pieces:
            shown.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(flush=True)
    return code, "".join(shown)


def _talk(llm: LLM, options: Options, params: dict[str, Any]) -> int:
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    print("Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr)
    while True:
        try:
            said = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return OK
        if not said.strip():
            continue
        turn = [*messages, {"role": "user", "content": said}]
        try:
            _, text = _show(_answer(llm, options, params, turn))
        except PromptError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        messages = [*turn, {"role": "assistant", "content": text.rpartition("\033[0m")[2].strip()}]
        _closing_line(llm)


def _record(completion: Completion) -> dict[str, Any]:
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
    message = getattr(completion, "message", None)
    if message is not None:
        record |= {
            "content": message.content,
            "reasoning": message.reasoning,
            "tool_calls": [dataclasses.asdict(call) for call in message.tool_calls],
        }
    return record


def _closing_line(llm: LLM) -> None:
    timing = llm.timing
    peak, where = peak_memory()
    parts = [
        f"prompt {timing.prompt_tokens:,} tokens at {timing.prefill_tokens_per_s:,.1f} tokens/s",
        f"{timing.completion_tokens:,} tokens written at {timing.decode_tokens_per_s:,.1f} tokens/s",
        f"first token after {timing.first_token_s:.2f} s",
        f"peak memory {peak / 1e9:.2f} GB ({where})",
    ]
    print(" | ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    finish(main)
