"""``python -m convert.verify DST --against SRC``: what a quantized model lost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from glm_jax.cli.common import OK, read_prompt_text, run_and_exit
from glm_jax.errors import PromptError

if TYPE_CHECKING:
    from convert.quality.divergence import PositionMetrics
    from glm_jax.checkpoint.sources.base import WeightSource

_Flag = Annotated[bool, arg(help_behavior_hint="")]
_File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]

DESCRIPTION = """\
Measure how close a model is to the one it was made from: bytes, errors of the weights, and on a text how far its
predictions are from the original's. The report goes to stdout, progress to stderr.

Examples:
  python -m convert.verify ./int4 --against ./original --text held_out.txt
  python -m convert.verify ./int4 --against ./original --weights-only     bytes and errors alone, in little memory
  python -m convert.verify tiny --against tiny --quantize int4 --method rtn --text held_out.txt
                                     the same without converting first: DST is quantized while it is read
  python -m convert.verify tiny --against tiny --cache-dtype int8 --text held_out.txt
                                     what an 8-bit cache costs by itself
  python -m convert.verify tiny --against tiny --quantize int4 --chat tiny
                                     the built-in miniature's held-out chat tasks
  python -m convert.verify ./int4 --against ./original --text held_out.txt --positions a.npz --json a.json
                                     for python -m convert.compare a.npz b.npz

Give text that neither model was trained or calibrated on, of the kind the model is for: 100,000 tokens give the mean
divergence to a few per cent. Both models must fit on the device together.
Exit codes: 0 done, 2 bad usage or input, 1 failure, 130 interrupted.
"""


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Options of the command."""

    destination: Annotated[str, Positional, arg(metavar="DST")]
    """The model to judge: folder (Hugging Face, converted), .gguf file, hub id, "tiny", "synthetic:flash?layers=2"."""
    against: Annotated[str, arg(metavar="SRC")]
    """The model that it was made from, given in the same way."""
    text: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FILE")] = ()
    """Compare predictions on this text ("-" for stdin); may be given several times."""
    chat: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also have both answer these chat tasks, one JSON object a line; "tiny" for those of the miniature."""
    weights_only: _Flag = False
    """Compare bytes and weights, and no predictions."""
    quantize: Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="(default: as stored)")] = None
    """int4, int4-small, int4-experts or int8: quantize DST's weights while reading them."""
    method: Annotated[Literal["rtn", "mse"] | None, arg(help_behavior_hint="(default: mse)")] = None
    """With --quantize: round to nearest, or search each group's scale for the least squared error."""
    cache_dtype: Literal["float32", "bfloat16", "int8", "fp8"] = "float32"
    """Of DST's latent cache; SRC's is float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of weights that are not quantized, on both sides; bfloat16 adds its own rounding."""
    window: Annotated[int, arg(metavar="N")] = 512
    """Tokens read at a time; each window begins without context."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Look at about this many tokens, in windows spread evenly over the text."""
    answer_tokens: Annotated[int, arg(metavar="N")] = 64
    """Longest answer to a chat task, thinking included."""
    json: _File = None
    """Write all figures to this file."""
    markdown: _File = None
    """Write the tables to this file too."""
    positions: _File = None
    """Write what was found at each token to this file (.npz)."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = tyro.cli(
        VerifyOptions, prog="python -m convert.verify", description=DESCRIPTION, args=args, config=(FlagCreatePairsOff,)
    )
    validate_options(options)
    texts = [read_prompt_text(name) for name in options.text]
    report, positions = run_verification(options, texts)
    from convert.quality.report_tables import render_quality_report

    text = render_quality_report(report)
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.positions and positions:
        positions.save(options.positions)
    return OK


def validate_options(options: VerifyOptions) -> None:
    """What is wrong with the call, before anything is read.

    Raises:
        GlmError: in one sentence.
    """
    if options.weights_only and (options.text or options.chat):
        raise PromptError("--weights-only compares no predictions: leave --text and --chat out, or leave it out")
    if not (options.weights_only or options.text or options.chat):
        raise PromptError(
            "there is no text to compare predictions on: give --text FILE (or --chat FILE), or --weights-only"
        )
    if options.positions and not options.text:
        raise PromptError("--positions needs --text: there are no tokens to write about")
    if options.method and not options.quantize:
        raise PromptError("--method says how to quantize: give --quantize too")
    for name in ("tokens", "answer_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise PromptError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for path in (options.json, options.markdown, options.positions):
        if path and not path.parent.is_dir():
            raise PromptError(f"cannot write {path}: there is no folder {path.parent}")


def run_verification(options: VerifyOptions, texts: Sequence[str]) -> tuple[dict[str, Any], PositionMetrics | None]:
    """Measures; returns the report, and what was found at each position where there was a text.

    Raises:
        GlmError: for what is wrong with the models, the text or the tasks.
    """
    from convert.quality import models
    from convert.quality.weight_errors import model_sizes, weight_errors
    from glm_jax.checkpoint.sources.open import open_source
    from glm_jax.engine.compile_cache import enable_compile_cache

    enable_compile_cache()
    reference = open_source(options.against, dtype=options.dtype)
    stored = open_source(options.destination, dtype=options.dtype)
    models.check_same_architecture(reference.cfg, stored.cfg)
    model = models.quantize_by_preset(stored, options.quantize, options.method or "mse")
    if not 2 <= options.window <= (longest := reference.cfg.max_position_embeddings):
        raise PromptError(f"--window must be 2 to {longest:,}, the longest context of this model, not {options.window}")
    inputs = None
    if not options.weights_only:
        inputs = _read_inputs(options, reference, stored, texts)
        models.require_device_memory(reference, model, dtype=options.dtype, window=options.window)
    report: dict[str, Any] = {
        "source": {"name": options.against, "kind": reference.info.kind, "size": model_sizes(reference)},
        "model": {
            "name": options.destination,
            "kind": stored.info.kind,
            "quantize": options.quantize,
            "method": (options.method or "mse") if options.quantize else None,
            "cache_dtype": options.cache_dtype,
            "size": model_sizes(model),
        },
        "dtype": options.dtype,
        "weights": weight_errors(reference, model, progress=True),
    }
    positions = None if inputs is None else _compare_predictions(options, reference, model, inputs, report)
    return report, positions


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    assets: tuple[Any, Any]
    token_ids: list[list[int]]
    tasks: list[dict[str, Any]]
    prompts: tuple[list[str], list[str]]


def _read_inputs(options: VerifyOptions, reference: WeightSource, other: WeightSource, texts: Sequence[str]) -> _Inputs:
    """What the models are to read, checked before the weights are."""
    from convert.quality import chat_tasks as chat
    from convert.quality import models, task_scoring
    from glm_jax.checkpoint.sources.open import tiny_folder
    from glm_jax.engine.assets import ModelAssets

    ours, theirs = (ModelAssets.load(source.cfg, source.info.folder) for source in (reference, other))
    ids = models.encode_texts(texts, ours, theirs) if texts else []
    file = tiny_folder() / "heldout_chat.jsonl" if options.chat == "tiny" else Path(options.chat or "")
    tasks = task_scoring.read_chat_tasks(file) if options.chat else []
    return _Inputs((ours, theirs), ids, tasks, (chat.render_prompts(tasks, ours), chat.render_prompts(tasks, theirs)))


def _compare_predictions(
    options: VerifyOptions, reference: WeightSource, model: WeightSource, inputs: _Inputs, report: dict[str, Any]
) -> PositionMetrics | None:
    from convert.quality import chat_tasks as chat
    from convert.quality import divergence, models

    ours, theirs = inputs.assets
    exact = models.load_compared_model(reference, ours, dtype=options.dtype, progress=True)
    other = models.load_compared_model(
        model, theirs, dtype=options.dtype, cache_dtype=options.cache_dtype, progress=True
    )
    positions = None
    if inputs.token_ids:
        (positions,) = divergence.measure_divergence(
            exact, [other], inputs.token_ids, window=options.window, max_tokens=options.tokens, progress=True
        )
        report["text"] = {"files": list(options.text), **positions.summary()}
    if inputs.tasks:
        answers = [
            chat.answer_tasks(side, inputs.tasks, given, max_tokens=options.answer_tokens, progress=True)
            for side, given in zip((exact, other), inputs.prompts, strict=True)
        ]
        report["chat"] = {"file": options.chat, **chat.summarize_comparison(*answers)}
    return positions


if __name__ == "__main__":
    run_and_exit(main)
