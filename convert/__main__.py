"""``python -m convert SRC DST``: checkpoints to and from this program's own folder layout."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glm_jax.errors import GlmError


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Convert a checkpoint. Run the same command again after a kill to go on; the result is the same."""

    source: Annotated[str, tyro.conf.Positional]
    """Hugging Face folder, hub id, converted folder, "tiny", or synthetic:flash?layers=4&seed=0."""
    destination: Annotated[str, tyro.conf.Positional]
    """A new or empty folder, or that of an earlier run: what is missing there, or of the wrong size, is written."""
    to: Literal["orbax", "safetensors"] = "orbax"
    """orbax: loads fast and in slices. safetensors: a Hugging Face folder; quantized weights as compressed-tensors."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights that are not quantized; unchanged unless given."""
    quantize: str | None = None
    """int4, int4-small, int4-experts or int8; every value stays as it is unless given."""
    method: Literal["rtn", "mse", "signround"] = "mse"
    """rtn: round to nearest. mse: search each group's scale for the least squared error. signround: also learn from
    text how to round, layer by layer; slow, and best."""
    calibration: Path | None = None
    """Text for signround: a text file, or .jsonl with "text" or "messages" on each line. The miniature's own data
    unless given, which suits the miniature."""
    check: bool = False
    """Refuse weights that are NaN or infinite; compare a finished conversion with the source, and mend it."""
    force: bool = False
    """Start over, replacing whatever conversion is in the destination."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 2 for bad input, 130 stopped from the keyboard."""
    options = tyro.cli(ConvertOptions, args=arguments, prog="python -m convert")
    # Conversion is the host's work: leave accelerators, and most of their memory, to others.
    if options.method != "signround":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from convert.calibrate import CalibrationConfig
    from convert.pipeline import convert_checkpoint

    try:
        report = convert_checkpoint(
            options.source,
            options.destination,
            to=options.to,
            dtype=options.dtype,
            quantize=options.quantize,
            method=options.method,
            calibration=None if options.calibration is None else CalibrationConfig(path=options.calibration),
            check=options.check,
            force=options.force,
            progress=True,
        )
    except GlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        same = "the same command without --force" if options.force else "the same command"
        print(f"stopped; {same} goes on where this one was", file=sys.stderr)
        return 130
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    kept = f" ({report.kept} of {report.kept + report.written} parts were there already)" if report.kept else ""
    print(f"{report.folder}: {report.nbytes / 1e9:.2f} GB{kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
