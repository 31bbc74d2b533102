"""Loads the backends, runs all cases, and keeps the report on disk up to date."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from glm_jax.bench.backend import BenchBackend
from glm_jax.bench.cases import cache_contents, parse_size_option, run_cases
from glm_jax.bench.glm_jax_backend import GlmJaxBackend
from glm_jax.bench.hardware import measure_bandwidth
from glm_jax.bench.options import DecodeOptions, PrefillOptions
from glm_jax.bench.report_tables import BenchReport, CaseResult, bench_report_markdown, case_length
from glm_jax.bench.transformers_backend import TransformersBackend
from glm_jax.cli.common import FAILURE, OK, set_memory_fraction
from glm_jax.engine.compile_cache import enable_compile_cache
from glm_jax.errors import GlmError
from glm_jax.model.kernel_selection import prefer_kernels
from glm_jax.weights import QuantRules
from pallas_kernels.machine_info import describe_machine, slugify
from pallas_kernels.report_format import format_size, write_report


def measure_and_print(options: DecodeOptions | PrefillOptions) -> int:
    """Runs the benchmark, prints its tables, and returns the exit code: that of a failure if any case failed."""
    validate_bench_options(options)
    set_memory_fraction(options.memory_fraction)
    report = run_benchmark(options)
    print(bench_report_markdown(report))
    return FAILURE if any("failed" in result for result in report["results"]) else OK


def validate_bench_options(options: DecodeOptions | PrefillOptions) -> None:
    """Checks the options before anything is loaded.

    Raises:
        GlmError: if an option is invalid.
    """
    counts = {"--repeats": options.repeats}
    parse_size_option(options.batch, "--batch")
    if isinstance(options, DecodeOptions):
        parse_size_option(options.context, "--context")
        counts["--tokens"] = options.tokens
    else:
        parse_size_option(options.lengths, "--lengths")
    for name, count in counts.items():
        if count < 1:
            raise GlmError(f"{name} must be at least 1, not {count}")
    QuantRules.resolve(options.quantize)
    if "unquantized" in options.peer and options.quantize is None:
        raise GlmError("--peer unquantized needs --quantize to compare with")
    for path in (options.json, options.markdown):
        if path is not None and not path.parent.is_dir():
            raise GlmError(f"cannot write {path}: {path.parent} is not a folder")
    if options.out is not None and not options.out.is_dir():
        raise GlmError(f"cannot write into {options.out}, which is not a folder")


def run_benchmark(options: DecodeOptions | PrefillOptions) -> BenchReport:
    """Loads the backends, runs the cases and returns the report, which is also written to disk after every case.

    Raises:
        GlmError: if a peer cannot run here.
    """
    enable_compile_cache()
    if "transformers" in options.peer:
        TransformersBackend.require(options.model)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if "reference" in options.peer and not prefer_kernels(None, dtype):
        raise GlmError("--peer reference compares with hand-written kernels, which do not run here")
    bandwidth = measure_bandwidth()
    own, peers = _load_backends(options, dtype)
    is_decode = isinstance(options, DecodeOptions)
    report: BenchReport = {
        "kind": "decode" if is_decode else "prefill",
        "model": options.model,
        "dtype": dtype,
        "cache_dtype": own.cache_dtype,
        "quantize": options.quantize,
        "kernels": own.use_kernels,
        "peers": [peer.name for peer in peers],
        "repeats": options.repeats,
        **({"tokens": options.tokens, "cache_holds": cache_contents(options)} if is_decode else {}),
        "machine": {**describe_machine(), "bandwidth": bandwidth},
        "loaded": {backend.name: dataclasses.asdict(backend.load_stats) for backend in [own, *peers]},
        "results": [],
    }
    for result in run_cases(options, own, peers, bandwidth["bytes_per_s"]):
        report["results"].append(result)
        write_bench_report(report, options)
        _print_progress(result)
    if jax.default_backend() == "cpu":
        _remeasure_bandwidth(report)
    write_bench_report(report, options)
    return report


def _remeasure_bandwidth(report: BenchReport) -> None:
    """Measures the bandwidth again and keeps the higher figure, which other load on the machine disturbed less."""
    machine = report["machine"]
    bandwidth = max(machine["bandwidth"], measure_bandwidth(), key=lambda measured: measured["bytes_per_s"])
    machine["bandwidth"] = bandwidth
    for read in (result["read"] for result in report["results"] if "read" in result):
        read["of_measured_bandwidth"] = read["bytes_per_s"] / bandwidth["bytes_per_s"]


def _load_backends(
    options: DecodeOptions | PrefillOptions, dtype: str
) -> tuple[GlmJaxBackend, list[BenchBackend[Any]]]:
    """Returns glm-jax and its peers."""
    load_peer: dict[str, Callable[[], BenchBackend[Any]]] = {
        "transformers": lambda: TransformersBackend(options.model, dtype),
        "reference": lambda: GlmJaxBackend(
            options.model, dtype, options.quantize, cache_dtype=options.cache_dtype, kernels="reference",
            name="reference",
        ),
        "unquantized": lambda: GlmJaxBackend(options.model, dtype, cache_dtype=options.cache_dtype, name="unquantized"),
    }  # fmt: skip
    own = GlmJaxBackend(options.model, dtype, options.quantize, cache_dtype=options.cache_dtype)
    return own, [load_peer[name]() for name in dict.fromkeys(options.peer)]


def write_bench_report(report: BenchReport, options: DecodeOptions | PrefillOptions) -> None:
    """Writes the report to every file that the options name."""
    tables = bench_report_markdown(report)
    contents = {options.json: report, options.markdown: tables}
    if options.out is not None:
        name = bench_report_name(report)
        contents |= {options.out / f"{name}.json": report, options.out / f"{name}.md": tables}
    for path, content in contents.items():
        if path is not None:
            write_report(path, content)


def bench_report_name(report: BenchReport) -> str:
    """Returns the name of a report's files: device, kind, model and quantization."""
    model = slugify(Path(report["model"]).name if os.path.sep in report["model"] else report["model"])
    return "-".join(filter(None, [slugify(report["machine"]["device"]), report["kind"], model, report["quantize"]]))


def _print_progress(result: CaseResult) -> None:
    if reason := result.get("skipped") or result.get("failed"):
        outcome = f"{'skipped' if 'skipped' in result else 'failed'}: {reason}"
    else:
        speed = result["glm_jax"]["tokens_per_s_of_all_rows"]["median"]
        outcome = f"{speed:,.2f} tokens/s of the whole batch"
    case = f"batch {result['batch']}, {format_size(case_length(result))} tokens"
    print(f"{case}: {outcome}", file=sys.stderr, flush=True)
