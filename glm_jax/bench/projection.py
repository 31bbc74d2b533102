"""What a decode report says of cards that were not measured: a projection, and named so wherever it is printed.

Reading ``n`` bytes took ``t = a + n / r`` in the report: ``a`` is what a step takes whatever it reads (launches and
waits), ``1 / r`` the slope over the contexts. A card of another bandwidth is given the same part of it that ``r`` is of
the measured card's, and the same ``a``. With one context only, ``a`` is zero and all of it counts as reading.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.errors import GlmError
from glm_jax.memory import MemoryPlan, known_gpus, parse_gpus, plan_memory
from glm_jax.sharding import MESH_AXES, get_sharding_preset
from glm_jax.weights import QuantRules
from glm_jax.weights.storage import plan_storage
from pallas_kernels.report_format import format_size, markdown_table

BenchReport = Mapping[str, Any]
_REQUIRED_FIELDS = ("model", "dtype", "cache_dtype", "quantize", "machine", "results")


@dataclasses.dataclass(kw_only=True)
class ProjectOptions:
    """Speeds that a decode report lets expect of other cards. A projection: nothing is run."""

    report: Path
    """JSON of ``python -m glm_jax.bench decode`` with one row (--batch 1) on a known card."""
    gpu: str = "rtx6000-ada,b200x4"
    """Cards, or several of one: "h100,b200x4"."""


@dataclasses.dataclass(frozen=True, slots=True)
class BandwidthFit:
    """How a card reads.

    Attributes:
        bandwidth_fraction: part of the data sheet's bandwidth that more bytes are read at.
        overhead_seconds: seconds of a step that do not depend on its bytes.
        num_contexts: how many the fit is of.
    """

    bandwidth_fraction: float
    overhead_seconds: float
    num_contexts: int


def fit_bandwidth(report: BenchReport) -> BandwidthFit:
    """The fit of a report's cases of one row.

    Raises:
        GlmError: if there are none, or the card is not known.
    """
    points = _read_points(report)
    kind = report["machine"]["device"]
    card = next((gpu for gpu in known_gpus().values() if kind.startswith(gpu.device_kind)), None)
    if not points:
        raise GlmError("the report has no case of one row whose bytes were counted: measure anew, with --batch 1")
    if card is None:
        raise GlmError(f"the report is of {kind!r}, whose bandwidth is not known; known are {', '.join(known_gpus())}")
    if len({nbytes for nbytes, _ in points}) == 1:
        nbytes, seconds = points[0][0], statistics.median(seconds for _, seconds in points)
        return BandwidthFit(nbytes / seconds / card.bandwidth, 0.0, 1)
    mean_n, mean_t = (sum(values) / len(points) for values in zip(*points, strict=True))
    over = sum((n - mean_n) ** 2 for n, _ in points)
    slope = sum((n - mean_n) * (t - mean_t) for n, t in points) / over
    if slope <= 0:
        raise GlmError("in this report a longer context takes no longer: measure contexts that are further apart")
    return BandwidthFit(1 / slope / card.bandwidth, max(0.0, mean_t - slope * mean_n), len(points))


def project_report(options: ProjectOptions) -> str:
    """A Markdown section with the projection.

    Raises:
        GlmError: if the report is none of decoding, or says too little.
    """
    report = _read_report(options.report)
    found = fit_bandwidth(report)
    contexts = sorted({result["context"] for result in report["results"] if result["batch"] == 1})
    rows = [_row(report, found, name, context) for name in options.gpu.split(",") for context in contexts]
    fixed = (
        f"{found.overhead_seconds * 1e6:,.0f} µs of a step whatever it reads"
        if found.num_contexts > 1
        else "one context only"
    )
    return "\n\n".join(
        [
            f"### Projection from {report['machine']['device']} ({report['quantize'] or report['dtype']}, one row)",
            f"Not measured. From {options.report.name}: {found.bandwidth_fraction:.0%} of the card's bandwidth, {fixed}. "
            "The same is assumed of the cards below; exchanges between several are not counted, and would come on top.",
            markdown_table(["card", "context", "bound tokens/s", "projected tokens/s"], rows, text_columns=1),
        ]
    )


def _row(report: BenchReport, found: BandwidthFit, name: str, context: int) -> list[str]:
    gpu, count = parse_gpus(name)
    planned = _plan_for_gpu(report, gpu.memory_bytes, gpu.bandwidth, count, context)
    seconds = found.overhead_seconds + planned.decode_bytes / (found.bandwidth_fraction * gpu.bandwidth)
    bound = gpu.bandwidth / planned.decode_bytes
    speed = f"{1 / seconds:,.0f}" if planned.fits else "does not fit"
    return [name.strip(), format_size(context), f"{bound:,.0f}", speed]


def _plan_for_gpu(report: BenchReport, memory: int, bandwidth: int, count: int, context: int) -> MemoryPlan:
    from glm_jax.plan import load_config_and_storage

    cfg, stored = load_config_and_storage(report["model"])
    rules, quant = get_sharding_preset("latency" if count > 1 else "replicated"), QuantRules.resolve(report["quantize"])
    storage = stored if quant is None else plan_storage(cfg, quant, rules, {MESH_AXES[1]: count})[0]
    return plan_memory(
        cfg,
        device_bytes=memory,
        dtype=report["dtype"],
        storage=storage,
        cache_dtype=report["cache_dtype"],
        devices=count,
        rules=rules,
        context=context,
        bandwidth=bandwidth,
        mtp=False,
    )


def _read_points(report: BenchReport) -> Sequence[tuple[float, float]]:
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
        raise GlmError(f"{path} is no report of python -m glm_jax.bench decode")
    if missing := [name for name in _REQUIRED_FIELDS if name not in report]:
        raise GlmError(f"{path} has no {missing[0]}: it is not as this version of the command writes it; measure anew")
    return report
