"""``python -m glm_jax.generate``: text from a model, on the terminal or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from glm_jax.cli import terminal
from glm_jax.cli.common import OK, optional_text, peak_memory, read_prompt_text, run_and_exit, set_memory_fraction
from glm_jax.errors import PromptError, SamplingError
from glm_jax.sampling import SamplingParams

if TYPE_CHECKING:
    from glm_jax.llm import LLM

_Flag = Annotated[bool, arg(help_behavior_hint="")]

DESCRIPTION = """\
Write text with GLM-4.7-Flash. The text goes to stdout, everything else to stderr.

Examples:
  python -m glm_jax.generate "def fib(n):"            continue a text, with the built-in miniature
  python -m glm_jax.generate --chat                   talk to it
  python -m glm_jax.generate --chat --no-thinking "What is 3 plus 4?"
  python -m glm_jax.generate --n 3 --seed 1 --json "import os"
  python -m glm_jax.generate -- "--begins with a dash"
  python -m glm_jax.generate --model zai-org/GLM-4.7-Flash --chat --prompt-file question.txt
  cat main.py | python -m glm_jax.generate --model ./converted --temperature 0 > more.py

Sampling options that are not given come from the checkpoint. The first run of a size compiles, and keeps the result.
Exit codes: 0 done, 2 bad usage or input, 1 failure, 130 interrupted.
"""


@dataclasses.dataclass
class GenerateOptions:
    """Options of the command."""

    prompt: Positional[Annotated[str | None, optional_text("PROMPT"), arg(help_behavior_hint="")]] = None
    """Text to continue or, with --chat, the message. Without one it is read from stdin, if something is piped in."""
    model: Annotated[str, arg(metavar="MODEL")] = "tiny"
    """Folder (Hugging Face, quantized or not; converted), .gguf file, hub id, "tiny", "synthetic:flash?layers=4"."""
    prompt_file: Annotated[str | None, optional_text("FILE"), arg(help_behavior_hint="")] = None
    """Read the prompt from this file ("-" for stdin)."""
    chat: _Flag = False
    """Answer the prompt as a message; without a prompt, hold a conversation."""
    system: Annotated[str | None, optional_text("TEXT"), arg(help_behavior_hint="")] = None
    """With --chat: what the model is told before the first message."""
    no_thinking: _Flag = False
    """With --chat: answer at once, without thinking first."""
    max_tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 512)")] = None
    """Longest completion."""
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="")] = None
    """How freely to choose: 0 takes the most likely token each time, 1 is the model's own distribution."""
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="")] = None
    """Choose among the most likely tokens that together have this probability."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: drawn; --json shows it)")] = None
    """The same seed gives the same text."""
    n: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """How many completions, with seeds that count up."""
    stop: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TEXT")] = ()
    """Ends a completion before this text."""
    sampling: Annotated[str | None, optional_text("JSON"), arg(help_behavior_hint="")] = None
    """Other sampling options: '{"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "logprobs": 5}'."""
    json: _Flag = False
    """Print one JSON object per completion instead of the text."""
    quantize: Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="(default: as stored)")] = None
    """int4, int4-small, int4-experts or int8: quantize the weights while loading."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations, and of weights that are not quantized."""
    mesh: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Devices to split the model over."""
    max_model_len: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: what fits)")] = None
    """Longest prompt and completion together."""
    memory_fraction: Annotated[float, arg(metavar="F")] = 0.95
    """Part of a GPU's memory to take."""
    check: _Flag = False
    """Look for damaged weights while loading."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = tyro.cli(
        GenerateOptions,
        prog="python -m glm_jax.generate",
        description=DESCRIPTION,
        args=args,
        config=(FlagCreatePairsOff,),
    )
    # What is wrong with the call is said before JAX is imported and weights are read.
    sampling = _sampling_options(options)
    prompt = _resolve_prompt(options)
    if prompt is None and sampling.get("n", 1) > 1:
        raise SamplingError("a conversation has one answer at a time: --n must be 1")
    set_memory_fraction(options.memory_fraction)
    llm = _load(options)
    if prompt is None:
        return terminal.run_conversation(lambda turns: _reply(llm, options, sampling, turns), _system_messages(options))
    code = _run_once(llm, options, sampling, prompt)
    _print_stats(llm)
    return code


def _load(options: GenerateOptions) -> LLM:
    from glm_jax.llm import LLM

    return LLM.load(
        options.model,
        quantize=options.quantize,
        dtype=options.dtype,
        mesh=options.mesh,
        max_model_len="auto" if options.max_model_len is None else options.max_model_len,
        check=options.check,
    )


def _sampling_options(options: GenerateOptions) -> dict[str, Any]:
    """The sampling options that were given, checked."""
    flags = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed", "n")}
    given = {name: value for name, value in flags.items() if value is not None}
    given |= {"stop": options.stop} if options.stop else {}
    if options.sampling is not None:
        more = _json_object(options.sampling)
        if twice := sorted(given.keys() & more.keys()):
            raise SamplingError(f"--{twice[0].replace('_', '-')} is in --sampling too: give it once")
        given |= more
    checked = SamplingParams.from_dict(given)
    return {name: getattr(checked, name) for name in given}


def _json_object(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplingError(f"--sampling must be a JSON object: {error}") from None
    if not isinstance(read, dict):
        raise SamplingError(f"--sampling must be a JSON object, not {text:.60}")
    return read


def _resolve_prompt(options: GenerateOptions) -> str | None:
    """The prompt; None for a conversation."""
    if not options.chat and (options.system is not None or options.no_thinking):
        raise PromptError("--system and --no-thinking shape an answer: give --chat too")
    if options.prompt is not None and options.prompt_file is not None:
        raise PromptError("give a prompt or --prompt-file, not both")
    if options.prompt is None and options.prompt_file is None and sys.stdin.isatty():
        if options.chat:
            return None
        raise PromptError('no prompt: give one, as in `python -m glm_jax.generate "def fib(n):"`, or --chat to talk')
    file = "-" if options.prompt_file is None else options.prompt_file
    prompt = read_prompt_text(file) if options.prompt is None else options.prompt
    if not prompt:
        raise PromptError("the prompt is empty: give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python shows bytes that are no UTF-8
        raise PromptError("the prompt is not UTF-8")
    return prompt


def _system_messages(options: GenerateOptions) -> list[terminal.MessageDict]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _run_once(llm: LLM, options: GenerateOptions, sampling: dict[str, Any], prompt: str) -> int:
    turns = [*_system_messages(options), {"role": "user", "content": prompt}]
    if options.json or sampling.get("n", 1) > 1:
        done = _chat(llm, options, sampling, turns) if options.chat else llm.generate(prompt, **sampling)
        terminal.print_completions(done, as_json=options.json)
        return OK
    if options.chat:
        return terminal.ChatPrinter(_chat(llm, options, sampling, turns, stream=True)).print_all()
    return terminal.print_stream(piece.text for piece in llm.stream(prompt, **sampling))


def _chat(
    llm: LLM,
    options: GenerateOptions,
    sampling: dict[str, Any],
    messages: list[terminal.MessageDict],
    **chat_options: Any,
) -> Any:
    switches = {"enable_thinking": False} if options.no_thinking else {}
    return llm.chat(messages, **switches, **sampling, **chat_options)


def _reply(
    llm: LLM, options: GenerateOptions, sampling: dict[str, Any], messages: list[terminal.MessageDict]
) -> str | None:
    """Prints the answer to a conversation; returns its content."""
    if options.json:
        done = _chat(llm, options, sampling, messages)
        terminal.print_completions(done, as_json=True)
        content = done.content
    else:
        answer = terminal.ChatPrinter(_chat(llm, options, sampling, messages, stream=True))
        answer.print_all()
        content = answer.content
    _print_stats(llm)
    return content


def _print_stats(llm: LLM) -> None:
    timing = llm.timing
    peak, where = peak_memory()
    parts = [
        f"prompt {timing.prompt_tokens:,} tokens at {timing.prefill_tokens_per_s:,.1f} tokens/s",
        f"{timing.completion_tokens:,} tokens written at {timing.decode_tokens_per_s:,.1f} tokens/s",
        f"first token after {timing.first_token_s:.2f} s",
        *([f"compiling, or loading what was, took {timing.compile_s:.1f} s"] if timing.compile_s >= 0.1 else []),
        f"peak memory {peak / 1e9:.2f} GB ({where})",
    ]
    print(" | ".join(parts), file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_and_exit(main)
