"""The conversion job: opens a source, quantizes it if asked to, and writes it, safe to kill and to run again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, cast, get_args

from convert.calibrate import CalibratedSource, CalibrationConfig
from convert.calibrate.signround import SignRoundConfig
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.write.conversion import ConversionReport, OutputFormat, resolve_destination, write_checkpoint
from glm_jax.checkpoint.write.pack_quantized import NON_LINEAR_PARAMS
from glm_jax.errors import CheckpointError, QuantError
from glm_jax.weights import QuantRules
from glm_jax.weights.quantization import QuantMethod


def convert_checkpoint(
    source: str | Path | WeightSource,
    destination: str | Path,
    *,
    to: OutputFormat = "orbax",
    dtype: Literal["bfloat16", "float32"] | None = None,
    quantize: str | QuantRules | None = None,
    method: Literal["rtn", "mse", "signround"] = "mse",
    calibration: CalibrationConfig | None = None,
    check: bool = False,
    force: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Converts a checkpoint; the same call after a kill goes on with the part that was being written.

    Args:
        source: anything that :func:`glm_jax.checkpoint.sources.open.open_source` takes.
        destination: new or empty folder, or that of an earlier run: a stopped conversion goes on, and of a finished
            one what is missing or of the wrong size is written again.
        to: "orbax" (parts that load fast and in slices) or "safetensors" (a Hugging Face folder).
        dtype: of the weights that are not quantized; ``None`` keeps every array's own.
        quantize: a preset (:data:`glm_jax.weights.QUANT_PRESETS`) or rules; ``None`` keeps every value.
        method: "rtn" rounds to nearest, "mse" searches scales for the least squared error, "signround" also learns
            from text how to round (one layer in memory at a time, about 24 bytes per weight of it).
        calibration: the text for "signround"; the miniature's own data unless given.
        check: refuse weights that are NaN or infinite; compare every byte of a finished conversion with the source, and
            write again what differs.
        force: start over, replacing whatever conversion is in the destination.
        progress: show it on stderr.

    Raises:
        CheckpointError: for bad sources, folders that cannot be written, full disks, and arrays that do not read back.
        ConfigError: for a ``config.json`` that this stack cannot run.
        QuantError: for a quantization that does not exist.
    """
    folder = resolve_destination(destination)
    weights = source if isinstance(source, WeightSource) else open_source(source, dtype=dtype)
    if weights.info.folder and weights.info.folder.resolve() == folder:
        raise CheckpointError(f"{folder} is the source: choose another destination")
    if rules := QuantRules.resolve(quantize):
        # What the folder cannot hold quantized is not rounded in vain.
        keep = NON_LINEAR_PARAMS if to == "safetensors" else ()
        weights = _quantize_source(weights, rules, method, calibration, dtype or weights.info.dtype, keep)
    elif calibration is not None:
        raise QuantError("a calibration text is for quantizing: say to what, with quantize (--quantize)")
    elif method != "mse":
        raise QuantError(f"{method} is a way to quantize: say to what, with quantize (--quantize)")
    quantized = f", quantized {quantize if isinstance(quantize, str) else 'by rules'} by {method}" if quantize else ""
    return write_checkpoint(
        weights, folder, to=to, dtype=dtype, check=check, force=force, progress=progress, method=quantized
    )


def _quantize_source(
    source: WeightSource,
    rules: QuantRules,
    method: str,
    calibration: CalibrationConfig | None,
    dtype: str,
    keep: Collection[tuple[str, ...]],
) -> WeightSource:
    if method == "signround":
        text = calibration or CalibrationConfig()
        return CalibratedSource(source, rules, text, SignRoundConfig(steps=text.steps), dtype=dtype, exclude=keep)
    if calibration is not None:
        raise QuantError(f"the method {method} uses no calibration text: say signround, or leave the text out")
    if method not in get_args(QuantMethod):
        raise QuantError(f"no method {method!r}; there are {', '.join(get_args(QuantMethod))}, signround")
    return RequantizedSource(source, rules, cast(QuantMethod, method), dtype=dtype, exclude=keep)
