"""Options of ``python -m convert.verify``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from glm_jax.errors import PromptError

_Flag = Annotated[bool, arg(help_behavior_hint="")]
_File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Options of the command."""

    destination: Annotated[str, Positional, arg(metavar="DST")]
    """Model to measure: folder (Hugging Face or converted), .gguf file, hub id, "tiny", "synthetic:flash?layers=2"."""
    against: Annotated[str, arg(metavar="SRC")]
    """Model that DST was made from, named in the same way."""
    text: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FILE")] = ()
    """Compare predictions on this text ("-" for stdin); may be given several times."""
    chat: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also let both models answer these chat tasks, one JSON object per line; "tiny" for the miniature's tasks."""
    weights_only: _Flag = False
    """Compare sizes and weights, but no predictions."""
    quantize: Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="(default: as stored)")] = None
    """int4, int4-small, int4-experts or int8: quantize DST's weights while reading them."""
    method: Annotated[Literal["rtn", "mse"] | None, arg(help_behavior_hint="(default: mse)")] = None
    """With --quantize: round to nearest, or search each group's scale for the least squared error."""
    cache_dtype: Literal["float32", "bfloat16", "int8", "fp8"] = "float32"
    """Dtype of DST's latent cache; SRC's is float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of weights that are not quantized, in both models; bfloat16 adds rounding of its own."""
    window: Annotated[int, arg(metavar="N")] = 512
    """Tokens per window; each window starts without context."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Compare about this many tokens, in windows spread evenly over the text."""
    answer_tokens: Annotated[int, arg(metavar="N")] = 64
    """Maximum length of an answer to a chat task, thinking included."""
    json: _File = None
    """Write all figures to this file, as JSON."""
    markdown: _File = None
    """Write the tables to this file too."""
    positions: _File = None
    """Write the metrics of each token to this file (.npz)."""


def validate_options(options: VerifyOptions) -> None:
    """Checks the options before anything is read.

    Raises:
        PromptError: if options contradict each other or are out of range.
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
