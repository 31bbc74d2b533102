"""``python -m glm_jax.generate``: writes text with a model, on the terminal or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from glm_jax.cli import terminal
from glm_jax.cli.common import OK, read_prompt_text, run_and_exit, set_memory_fraction
from glm_jax.cli.text_option import optional_text
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
    """With --chat: system message before the first message."""
    no_thinking: _Flag = False
    """With --chat: answer at once, without thinking first."""
    max_tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 512)")] = None
    """Longest completion."""
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="")] = None
    """Randomness: 0 takes the most likely token each time, 1 samples from the model's own distribution."""
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="")] = None
    """Sample among the most likely tokens that together have this probability."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: random; --json shows it)")] = None
    """The same seed gives the same text."""
    n: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Number of completions, with consecutive seeds."""
    stop: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TEXT")] = ()
    """End a completion before this text."""
    sampling: Annotated[str | None, optional_text("JSON"), arg(help_behavior_hint="")] = None
    """Other sampling options: '{"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "logprobs": 5}'."""
    json: _Flag = False
    """Print one JSON object per completion instead of the text."""
    quantize: Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="(default: as stored)")] = None
    """int4, int4-small, int4-experts or int8: quantize the weights while loading."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations, and of weights that are not quantized."""
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
    # Bad options are reported before JAX is imported and weights are read.
    sampling = _sampling_options(options)
    prompt = _resolve_prompt(options)
    if prompt is None and sampling.get("n", 1) > 1:
        raise SamplingError("a conversation has one answer at a time: --n must be 1")
    set_memory_fraction(options.memory_fraction)
    llm = _load(options)
    if prompt is None:
        return terminal.run_conversation(lambda turns: _reply(llm, options, sampling, turns), _system_messages(options))
    code = _answer_prompt(llm, options, sampling, prompt)
    _print_stats(llm)
    return code


def _load(options: GenerateOptions) -> LLM:
    from glm_jax.llm import LLM  # imports JAX, which --help must not wait for

    return LLM.load(
        options.model,
        quantize=options.quantize,
        dtype=options.dtype,
        mesh=options.mesh,
        max_model_len="auto" if options.max_model_len is None else options.max_model_len,
        check=options.check,
    )


def _sampling_options(options: GenerateOptions) -> dict[str, Any]:
    """The validated sampling options of the command line; all others keep the checkpoint's defaults."""
    flags = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed", "n")}
    sampling = {name: value for name, value in flags.items() if value is not None}
    sampling |= {"stop": options.stop} if options.stop else {}
    if options.sampling is not None:
        from_json = _parse_json_object(options.sampling)
        if repeated := sorted(sampling.keys() & from_json.keys()):
            raise SamplingError(f"--{repeated[0].replace('_', '-')} is in --sampling too: give it once")
        sampling |= from_json
    params = SamplingParams.from_dict(sampling)
    return {name: getattr(params, name) for name in sampling}


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplingError(f"--sampling must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise SamplingError(f"--sampling must be a JSON object, not {text:.60}")
    return value


def _resolve_prompt(options: GenerateOptions) -> str | None:
    """The prompt from the command line, a file or stdin; None for a conversation."""
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
    if any(
        "\ud800" <= character <= "\udfff" for character in prompt
    ):  # Python decodes bytes of arguments that are not UTF-8 as lone surrogates
        raise PromptError("the prompt is not UTF-8")
    return prompt


def _system_messages(options: GenerateOptions) -> list[terminal.MessageDict]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _answer_prompt(llm: LLM, options: GenerateOptions, sampling: dict[str, Any], prompt: str) -> int:
    """Prints the completions of one prompt, or the answers to it; returns the exit code."""
    messages = [*_system_messages(options), {"role": "user", "content": prompt}]
    can_stream = not options.json and sampling.get("n", 1) == 1
    if can_stream and options.chat:
        return _stream_answer(llm, options, sampling, messages).print_all()
    if can_stream:
        return terminal.print_stream(chunk.text for chunk in llm.stream(prompt, **sampling))
    if options.chat:
        completions = llm.chat(messages, **_template_switches(options), **sampling)
    else:
        completions = llm.generate(prompt, **sampling)
    terminal.print_completions(completions, as_json=options.json)
    return OK


def _stream_answer(
    llm: LLM, options: GenerateOptions, sampling: dict[str, Any], messages: list[terminal.MessageDict]
) -> terminal.ChatPrinter:
    stream = llm.chat(messages, stream=True, **_template_switches(options), **sampling)
    return terminal.ChatPrinter(stream)


def _template_switches(options: GenerateOptions) -> dict[str, Any]:
    return {"enable_thinking": False} if options.no_thinking else {}


def _reply(
    llm: LLM, options: GenerateOptions, sampling: dict[str, Any], messages: list[terminal.MessageDict]
) -> str | None:
    """Prints the answer to a conversation; returns its content."""
    if options.json:
        completion = llm.chat(messages, **_template_switches(options), **sampling)
        terminal.print_completions(completion, as_json=True)
        content = completion.content
    else:
        printer = _stream_answer(llm, options, sampling, messages)
        printer.print_all()
        content = printer.content
    _print_stats(llm)
    return content


def _print_stats(llm: LLM) -> None:
    """Prints speeds, the time to the first token and the peak of memory on stderr."""
    from glm_jax.memory import peak_memory  # imports JAX, which --help must not wait for

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
