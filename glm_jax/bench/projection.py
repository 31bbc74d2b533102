"""Projects the speeds of a decode report onto GPUs that were not measured; the output always says so.

Reading ``n`` bytes took ``t = a + n / r`` seconds in the report. The overhead ``a`` is the time of a step whatever it
reads (launches and waits), and ``1 / r`` is the slope over the contexts. Another GPU is assumed to reach the same
fraction of its data sheet's bandwidth that ``r`` is of the measured GPU's, with the same overhead ``a``. From a single
context, all time counts as reading and ``a`` is zero.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from glm_jax.bench.options import ProjectOptions
from glm_jax.bench.report_tables import BenchReport
from glm_jax.checkpoint.sources.inspect import load_config_and_storage
from glm_jax.errors import GlmError
from glm_jax.memory import GpuInfo, MemoryPlan, find_gpu, known_gpus, parse_gpus, plan_memory_on_gpus, resolve_storage
from pallas_kernels.report_format import format_size, markdown_table

_REQUIRED_FIELDS = ("model", "dtype", "cache_dtype", "quantize", "machine", "results")


@dataclasses.dataclass(frozen=True, slots=True)
class BandwidthFit:
    """Speed at which a GPU reads, fitted to a report.

    Attributes:
        bandwidth_fraction: Fraction of the data sheet's bandwidth at which additional bytes are read.
        overhead_seconds: Seconds of a step that do not depend on its bytes.
        num_contexts: Number of measurements in the fit.
    """

    bandwidth_fraction: float
    overhead_seconds: float
    num_contexts: int


def fit_bandwidth(report: BenchReport) -> BandwidthFit:
    """Fits the cases of batch size 1 by least squares.

    Raises:
        GlmError: if there are no such cases, the GPU is unknown, or the fit makes no sense.
    """
    points = _measured_points(report)
    device_kind = report["machine"]["device"]
    gpu = find_gpu(device_kind)
    if not points:
        raise GlmError("the report has no case of batch size 1 with a count of bytes: measure again, with --batch 1")
    if gpu is None:
        raise GlmError(
            f"the report is of {device_kind!r}, whose bandwidth is not known; known are {', '.join(known_gpus())}"
        )
    if len({nbytes for nbytes, _ in points}) == 1:
        nbytes, seconds = points[0][0], statistics.median(seconds for _, seconds in points)
        return BandwidthFit(nbytes / seconds / gpu.bandwidth, 0.0, 1)
    mean_bytes, mean_seconds = (statistics.fmean(values) for values in zip(*points, strict=True))
    variance = sum((nbytes - mean_bytes) ** 2 for nbytes, _ in points)
    slope = sum((nbytes - mean_bytes) * (seconds - mean_seconds) for nbytes, seconds in points) / variance
    if slope <= 0:
        raise GlmError("in this report a longer context takes no longer: measure contexts that are further apart")
    return BandwidthFit(1 / slope / gpu.bandwidth, max(0.0, mean_seconds - slope * mean_bytes), len(points))


def project_report(options: ProjectOptions) -> str:
    """Returns a Markdown section with the projection.

    Raises:
        GlmError: if the file is not a decode report, or the report has too little in it.
    """
    report = _read_report(options.report)
    fit = fit_bandwidth(report)
    contexts = sorted({result["context"] for result in report["results"] if result["batch"] == 1})
    rows = [_projection_cells(report, fit, gpus, context) for gpus in options.gpu.split(",") for context in contexts]
    overhead = f"{fit.overhead_seconds * 1e6:,.0f} µs of overhead per step"
    return "\n\n".join(
        [
            f"### Projection from {report['machine']['device']} ({report['quantize'] or report['dtype']}, one row)",
            f"Not measured. From {options.report.name}: {fit.bandwidth_fraction:.0%} of the GPU's bandwidth, "
            f"{overhead if fit.num_contexts > 1 else 'one context only'}. "
            "The same is assumed of the GPUs below. Exchanges between several GPUs are not counted and come on top.",
            markdown_table(["card", "context", "bound tokens/s", "projected tokens/s"], rows, text_columns=1),
        ]
    )


def _projection_cells(report: BenchReport, fit: BandwidthFit, gpus: str, context: int) -> list[str]:
    gpu, count = parse_gpus(gpus)
    plan = _plan_report(report, gpu, count, context)
    seconds = fit.overhead_seconds + plan.decode_bytes / (fit.bandwidth_fraction * gpu.bandwidth)
    bound = gpu.bandwidth / plan.decode_bytes
    speed = f"{1 / seconds:,.0f}" if plan.fits else "does not fit"
    return [gpus.strip(), format_size(context), f"{bound:,.0f}", speed]


def _plan_report(report: BenchReport, gpu: GpuInfo, count: int, context: int) -> MemoryPlan:
    """Plans the report's model on other GPUs."""
    cfg, stored = load_config_and_storage(report["model"])
    return plan_memory_on_gpus(
        cfg,
        gpu,
        count,
        dtype=report["dtype"],
        storage=resolve_storage(cfg, stored, report["quantize"], count),
        cache_dtype=report["cache_dtype"],
        context=context,
        mtp=False,
    )


def _measured_points(report: BenchReport) -> Sequence[tuple[float, float]]:
    """Returns bytes and seconds per step of the cases of batch size 1."""
    return [
        (float(result["read"]["bytes_per_step"]), result["glm_jax"]["ms_per_token_of_one_row"]["median"] / 1e3)
        for result in report["results"]
        if result["batch"] == 1 and "read" in result
    ]


def _read_report(path: Path) -> BenchReport:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GlmError(f"cannot read {path}: {error}") from None
    if not isinstance(report, dict) or report.get("kind") != "decode":
        raise GlmError(f"{path} is not a report of python -m glm_jax.bench decode")
    if missing := [name for name in _REQUIRED_FIELDS if name not in report]:
        raise GlmError(f"{path} has no {missing[0]}: another version of the command wrote it; measure again")
    return report
