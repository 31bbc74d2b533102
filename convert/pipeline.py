"""Runs a conversion: opens the source, quantizes it if requested, and writes it to a folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, cast, get_args

from convert.calibrate import CalibratedSource, CalibrationConfig
from convert.calibrate.signround import SignRoundConfig
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.write.conversion import (
    ConversionReport,
    OutputFormat,
    reject_source_folder,
    resolve_destination,
    write_checkpoint,
)
from glm_jax.checkpoint.write.pack_quantized import NON_LINEAR_PARAMS
from glm_jax.errors import QuantError
from glm_jax.weights import QuantRules
from glm_jax.weights.params import ParamPath
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
    """Converts a checkpoint; after a kill, the same call resumes with the layer that was being written.

    Args:
        source: Anything that :func:`glm_jax.checkpoint.sources.open.open_source` accepts, or an open source.
        destination: New or empty folder, or the destination of an earlier call. A stopped conversion resumes; in a
            finished one, output that is missing or has the wrong size is written again.
        to: "orbax" for a converted folder, which loads fast and in slices; "safetensors" for a Hugging Face folder.
        dtype: Dtype of weights that are not quantized; ``None`` keeps each array's own.
        quantize: Preset (a name in :data:`glm_jax.weights.QUANT_PRESETS`) or rules; ``None`` keeps all values.
        method: "rtn" rounds to nearest, "mse" searches scales for the least squared error, "signround" also learns
            rounding from text, one layer in memory at a time (about 24 bytes per weight of that layer).
        calibration: Calibration text for "signround"; ``None`` for the miniature's own data.
        check: Whether to reject NaN and infinite weights, and to compare every byte of a finished conversion with the
            source; output that differs is written again.
        force: Whether to start over and replace any conversion in the destination.
        progress: Whether to show progress on stderr.

    Returns:
        Destination, sizes and notes of the conversion.

    Raises:
        CheckpointError: if the source is damaged, the folder cannot be written, the disk is full, or arrays do not read
            back as written.
        ConfigError: for a ``config.json`` that this stack cannot run.
        MemoryPlanError: if learned rounding does not fit in memory.
        QuantError: for an unknown preset or method.
    """
    folder = resolve_destination(destination)
    weights = source if isinstance(source, WeightSource) else open_source(source, dtype=dtype)
    reject_source_folder(weights, folder)  # before quantization, which may read text first
    if rules := QuantRules.resolve(quantize):
        # Parameters that the destination cannot hold quantized keep their exact values.
        exclude = NON_LINEAR_PARAMS if to == "safetensors" else ()
        weights = _quantize_source(weights, rules, method, calibration, dtype or weights.info.dtype, exclude)
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
    quant_rules: QuantRules,
    method: str,
    calibration: CalibrationConfig | None,
    dtype: str,
    exclude: Collection[ParamPath],
) -> WeightSource:
    if method == "signround":
        calibration = calibration or CalibrationConfig()
        config = SignRoundConfig(steps=calibration.steps)
        return CalibratedSource(source, quant_rules, calibration, config, dtype=dtype, exclude=exclude)
    if calibration is not None:
        raise QuantError(f"the method {method} uses no calibration text: choose signround, or leave the text out")
    if method not in get_args(QuantMethod):
        raise QuantError(f"no method {method!r}; there are {', '.join(get_args(QuantMethod))}, signround")
    return RequantizedSource(source, quant_rules, cast(QuantMethod, method), dtype=dtype, exclude=exclude)
