"""Command line of ``python -m convert``, which converts checkpoints to and from the converted-folder format."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glm_jax.cli.common import log_to_stderr
from glm_jax.errors import GlmError


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Convert a checkpoint. After a kill, the same command resumes, and the result is identical."""

    source: Annotated[str, tyro.conf.Positional]
    """Hugging Face folder, hub id, converted folder, GGUF file, "tiny", or "synthetic:flash?layers=4&seed=0"."""
    destination: Annotated[str, tyro.conf.Positional]
    """New or empty folder, or the destination of an earlier run: output that is missing or has the wrong size is
    written again."""
    to: Literal["orbax", "safetensors"] = "orbax"
    """orbax: a converted folder, which loads fast and in slices. safetensors: a Hugging Face folder, with quantized
    weights in the compressed-tensors format."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights that are not quantized. Default: unchanged."""
    quantize: str | None = None
    """Quantize to int4, int4-small, int4-experts or int8. Default: all values stay unchanged."""
    method: Literal["rtn", "mse", "signround"] = "mse"
    """rtn: round to nearest. mse: search each group's scale for the least squared error. signround: also learn rounding
    from text, layer by layer; slowest, and most accurate."""
    calibration: Path | None = None
    """Calibration text for signround: a text file, or a .jsonl file with "text" or "messages" on each line. Default:
    the miniature's own data, which suits only the miniature."""
    check: bool = False
    """Reject NaN and infinite weights; compare a finished conversion with the source, and rewrite what differs."""
    force: bool = False
    """Start over, and replace any conversion in the destination."""


@log_to_stderr()
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 for success, 2 for bad input, 130 if interrupted."""
    options = tyro.cli(ConvertOptions, args=arguments, prog="python -m convert")
    # Conversion runs on the host, so it leaves accelerators and their memory to other processes.
    if options.method != "signround":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from convert import calibrate, pipeline  # they import JAX, which must read the environment first

    calibration = None if options.calibration is None else calibrate.CalibrationConfig(path=options.calibration)
    try:
        report = pipeline.convert_checkpoint(
            options.source,
            options.destination,
            to=options.to,
            dtype=options.dtype,
            quantize=options.quantize,
            method=options.method,
            calibration=calibration,
            check=options.check,
            force=options.force,
            progress=True,
        )
    except GlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        command = "the same command without --force" if options.force else "the same command"
        print(f"stopped; {command} resumes the conversion", file=sys.stderr)
        return 130
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    kept = f" ({report.kept} of {report.kept + report.written} shards were already complete)" if report.kept else ""
    print(f"{report.folder}: {report.nbytes / 1e9:.2f} GB{kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
