"""Loads all sides, times all cases, and keeps the report up to date on disk."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from glm_jax.bench import hardware
from glm_jax.bench.glm_jax_backend import GlmJaxBackend, cache_capacity
from glm_jax.bench.options import DecodeOptions, PrefillOptions, parse_size_option, validate_bench_options
from glm_jax.bench.profiler import profile_operations
from glm_jax.bench.report_tables import bench_report_markdown
from glm_jax.bench.timing import decode_metrics, prefill_metrics, random_prompts, time_interleaved
from glm_jax.bench.transformers_backend import TransformersBackend
from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX
from glm_jax.cli.common import FAILURE, OK, set_memory_fraction
from glm_jax.engine.compile_cache import enable_compile_cache
from glm_jax.engine.runner import MAX_BATCHED_PREFILL_TOKENS
from glm_jax.engine.steps import bucket_size
from glm_jax.errors import GlmError
from glm_jax.memory import (
    PREFILL_CHUNK_SIZE,
    MemoryPlan,
    available_device_memory,
    device_bandwidth,
    format_bytes,
    plan_memory,
)
from glm_jax.memory.estimates import estimate_workspace
from glm_jax.model.kernel_selection import prefer_kernels
from pallas_kernels import LaunchError
from pallas_kernels.machine_info import describe_machine, slugify
from pallas_kernels.report_format import format_size, write_report

BenchReport = dict[str, Any]


class CaseSkipped(Exception):
    """A case that cannot be run here, and why."""


def measure_and_print(options: DecodeOptions | PrefillOptions) -> int:
    """Checks, times, prints the tables; the exit code is that of a failure if any case failed."""
    validate_bench_options(options)
    set_memory_fraction(options.memory_fraction)
    report = run_benchmark(options)
    print(bench_report_markdown(report))
    return FAILURE if any("failed" in result for result in report["results"]) else OK


def run_benchmark(options: DecodeOptions | PrefillOptions) -> BenchReport:
    """Loads, times and returns the report, which is written after every case where the options say."""
    enable_compile_cache()
    if "transformers" in options.peer:
        TransformersBackend.require(options.model)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if "reference" in options.peer and not prefer_kernels(None, dtype):
        raise GlmError("--peer reference compares with hand-written kernels, which do not run here")
    measured = hardware.measure_bandwidth()
    sides = _load_backends(options, dtype)
    report: BenchReport = {
        "kind": "decode" if isinstance(options, DecodeOptions) else "prefill",
        "model": options.model,
        "dtype": dtype,
        "cache_dtype": sides[0].cache_dtype,
        "quantize": options.quantize,
        "kernels": sides[0].by_kernels,
        "peers": [side.name for side in sides[1:]],
        "repeats": options.repeats,
        **(
            {"tokens": options.tokens, "cache_holds": _cache_holds(options)}
            if isinstance(options, DecodeOptions)
            else {}
        ),
        "machine": {**describe_machine(), "bandwidth": measured},
        "loaded": {side.name: dataclasses.asdict(side.loaded) for side in sides},
        "results": [],
    }
    for result in _run_cases(options, sides, measured["bytes_per_s"]):
        report["results"].append(result)
        write_bench_report(report, options)
        _print_progress(result)
    if jax.default_backend() == "cpu":  # before or after, whichever was disturbed less
        measured = max(measured, hardware.measure_bandwidth(), key=lambda found: found["bytes_per_s"])
        report["machine"]["bandwidth"] = measured
        for read in (result["read"] for result in report["results"] if "read" in result):
            read["of_measured_bandwidth"] = read["bytes_per_s"] / measured["bytes_per_s"]
    write_bench_report(report, options)
    return report


def write_bench_report(report: BenchReport, options: DecodeOptions | PrefillOptions) -> None:
    """Writes the report where the options say."""
    tables = bench_report_markdown(report)
    targets = {options.json: report, options.markdown: tables}
    if options.out is not None:
        name = bench_report_name(report)
        targets |= {options.out / f"{name}.json": report, options.out / f"{name}.md": tables}
    for path, content in targets.items():
        if path is not None:
            write_report(path, content)


def bench_report_name(report: BenchReport) -> str:
    """Of a report's files: device, kind, model and storage."""
    model = slugify(Path(report["model"]).name if os.path.sep in report["model"] else report["model"])
    return "-".join(filter(None, [slugify(report["machine"]["device"]), report["kind"], model, report["quantize"]]))


def _load_backends(options: DecodeOptions | PrefillOptions, dtype: str) -> list[Any]:
    make: dict[str, Callable[[], Any]] = {
        "transformers": lambda: TransformersBackend(options.model, dtype),
        "reference": lambda: GlmJaxBackend(
            options.model, dtype, options.quantize, cache_dtype=options.cache_dtype, kernels="reference",
            name="reference",
        ),
        "unquantized": lambda: GlmJaxBackend(options.model, dtype, cache_dtype=options.cache_dtype, name="unquantized"),
    }  # fmt: skip
    ours = GlmJaxBackend(options.model, dtype, options.quantize, cache_dtype=options.cache_dtype)
    return [ours, *[make[name]() for name in dict.fromkeys(options.peer)]]


def _cache_holds(options: DecodeOptions) -> str:
    return "prompts" if "transformers" in options.peer else "random rows"


def _run_cases(options: DecodeOptions | PrefillOptions, backends: list[Any], bandwidth: float) -> Iterator[BenchReport]:
    decoding = isinstance(options, DecodeOptions)
    axis, text = ("context", options.context) if decoding else ("length", options.lengths)
    for batch in parse_size_option(options.batch, "--batch"):
        for first, length in enumerate(parse_size_option(text, f"--{axis}")):
            case = {"batch": batch, axis: length}
            try:
                _require_memory(backends, batch, length, options.tokens if decoding else 0)
                if decoding:
                    found = _run_decode_case(options, backends, batch, length, bandwidth, first == 0)
                else:
                    found = _run_prefill_case(options, backends, batch, length)
            except CaseSkipped as reason:
                found = {"skipped": str(reason)}
            except (jax.errors.JaxRuntimeError, LaunchError, GlmError) as error:
                # What fails must not take the other cases with it.
                line = str(error).strip().partition("\n")[0][:300]
                found = {"skipped" if "RESOURCE_EXHAUSTED" in line else "failed": line}
            yield case | found


def _run_decode_case(
    options: DecodeOptions, sides: list[Any], batch: int, context: int, bandwidth: float, counted: bool
) -> BenchReport:
    ours, tokens = sides[0], options.tokens
    if _cache_holds(options) == "prompts":
        given = random_prompts(batch, context, ours.cfg.vocab_size)
        states = [side.start(given, tokens) for side in sides]
    else:
        states = [side.filled(batch, context, tokens) for side in sides]
    calls = [lambda s=side, at=state: s.decode(at, tokens) for side, state in zip(sides, states, strict=True)]
    seconds, compared = time_interleaved(sides, calls, options.repeats)
    result: BenchReport = {
        side.name: {**decode_metrics(taken, batch, tokens), "compile_s": round(side.compile_seconds, 3)}
        for side, taken in zip(sides, seconds, strict=True)
    }
    step = result[ours.name]["ms_per_token_of_one_row"]["median"] / 1e3
    result["read"] = _bandwidth_metrics(ours, batch, context, step, bandwidth)
    if options.details and jax.default_backend() == "gpu":
        if counted:  # which compiles once more
            result["compiled"] = ours.launches(states[0])
        if ran := profile_operations(lambda: ours.decode(states[0], tokens), tokens):
            result["profiled"] = ran
    return result | _drop_incomparable(options, compared)


def _run_prefill_case(options: PrefillOptions, sides: list[Any], batch: int, length: int) -> BenchReport:
    given = random_prompts(batch, length, sides[0].cfg.vocab_size)
    calls = [lambda s=side: s.prefill(given) for side in sides]
    seconds, compared = time_interleaved(sides, calls, options.repeats)
    result: BenchReport = {
        side.name: {**prefill_metrics(taken, batch, length), "compile_s": round(side.compile_seconds, 3)}
        for side, taken in zip(sides, seconds, strict=True)
    }
    if options.details and jax.default_backend() == "gpu" and (ran := profile_operations(calls[0], 1)):
        result["profiled"] = ran
    return result | _drop_incomparable(options, compared)


def _drop_incomparable(options: DecodeOptions | PrefillOptions, compared: BenchReport) -> BenchReport:
    """Without the tokens of sides that hold other weights: random codes do not stand for the plain random weights."""
    if options.model.startswith(SYNTHETIC_PREFIX):
        compared.get("same_tokens", {}).pop("unquantized", None)
    return compared


def _bandwidth_metrics(ours: GlmJaxBackend, batch: int, context: int, seconds: float, bandwidth: float) -> BenchReport:
    """Bytes of a step, how fast they were read, and what part that is of what could be."""
    nbytes = ours.bytes_per_step(batch, context)
    found = {
        "bytes_per_step": nbytes,
        "bytes_per_token": round(nbytes / batch),
        # Which experts several rows choose is not asked for.
        "experts": "those chosen" if batch == 1 else "as many as uniform routing chooses",
        "bytes_per_s": nbytes / seconds,
        "of_measured_bandwidth": nbytes / seconds / bandwidth,
    }
    bound = plan_case(ours, batch, context).bound_tokens_per_s
    if bound is None:
        return found
    speed = batch / seconds
    return found | {"bound_tokens_per_s_of_all_rows": bound, "of_bound": speed / bound}


def plan_case(ours: GlmJaxBackend, batch: int, context: int) -> MemoryPlan:
    """What ``python -m glm_jax.plan`` says of a case on this device."""
    device = jax.devices()[0]
    return plan_memory(
        ours.cfg,
        device_bytes=available_device_memory(device),
        dtype=ours.dtype,
        storage=ours.storage,
        cache_dtype=ours.cache_dtype,
        context=min(context, ours.cfg.max_position_embeddings),
        sequences=batch,
        bandwidth=device_bandwidth(device),
        mtp=False,
        on_cpu=device.platform == "cpu",
    )


def _require_memory(sides: Sequence[Any], batch: int, length: int, tokens: int) -> None:
    """Raises :class:`CaseSkipped` where the model knows no such length, or cache and workspace will not fit."""
    ours = [side for side in sides if isinstance(side, GlmJaxBackend)]
    cfg = ours[0].cfg
    if length + tokens + 1 > cfg.max_position_embeddings:
        raise CaseSkipped(f"longer than the model's {cfg.max_position_embeddings:,} tokens")
    rows, free = bucket_size(batch), available_device_memory(jax.devices()[0])
    chunk = 1 if tokens else min(PREFILL_CHUNK_SIZE, max(16, MAX_BATCHED_PREFILL_TOKENS // rows))
    need = 0
    for side in ours:
        setup = plan_case(side, rows, length).memory_model
        room = cache_capacity(length, tokens) if tokens else bucket_size(length, 128)
        need += setup.requirement(rows, room).cache + estimate_workspace(cfg, setup.placement, rows, room, chunk).total
    if need > free:
        raise CaseSkipped(f"needs {format_bytes(need)} for cache and workspace, and {format_bytes(free)} are free")


def _print_progress(result: BenchReport) -> None:
    length = result["context" if "context" in result else "length"]
    if why := result.get("skipped") or result.get("failed"):
        text = f"{'skipped' if 'skipped' in result else 'failed'}: {why}"
    else:
        speed = result["glm_jax"]["tokens_per_s_of_all_rows"]["median"]
        text = f"{speed:,.2f} tokens/s of all rows together"
    print(f"batch {result['batch']}, {format_size(length)} tokens: {text}", file=sys.stderr, flush=True)
