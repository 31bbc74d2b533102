"""Loads all sides, times all cases, and keeps the report up to date on disk."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from glm_jax.bench import hardware as machine
from glm_jax.bench.glm_jax_backend import Ours, slots
from glm_jax.bench.options import Decode, Prefill, check, numbers
from glm_jax.bench.profiler import profiled
from glm_jax.bench.report_tables import markdown
from glm_jax.bench.timing import compare, of_decoding, of_prompts, prompts
from glm_jax.bench.transformers_backend import Transformers
from glm_jax.checkpoint.sources.synthetic import PREFIX
from glm_jax.cli.common import FAILURE, OK, set_memory_fraction
from glm_jax.engine.compile_cache import use_compile_cache
from glm_jax.engine.runner import PREFILL_TOKENS
from glm_jax.engine.steps import bucket
from glm_jax.errors import GlmError
from glm_jax.memory import PREFILL_CHUNK, MemoryPlan, bandwidth_of, device_limit, in_gb, plan
from glm_jax.memory.estimates import workspace
from glm_jax.model.kernel_selection import wants_kernels
from pallas_kernels import LaunchError
from pallas_kernels.machine_info import describe, slug
from pallas_kernels.report_format import short
from pallas_kernels.report_format import write as write_file

Report = dict[str, Any]


class CaseSkipped(Exception):
    """A case that cannot be run here, and why."""


def measure(options: Decode | Prefill) -> int:
    """Checks, times, prints the tables; the exit code is that of a failure if any case failed."""
    check(options)
    set_memory_fraction(options.memory_fraction)
    report = run(options)
    print(markdown(report))
    return FAILURE if any("failed" in result for result in report["results"]) else OK


def run(options: Decode | Prefill) -> Report:
    """Loads, times and returns the report, which is written after every case where the options say."""
    use_compile_cache()
    if "transformers" in options.peer:
        Transformers.require(options.model)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if "reference" in options.peer and not wants_kernels(None, dtype):
        raise GlmError("--peer reference compares with hand-written kernels, which do not run here")
    measured = machine.bandwidth()
    sides = _sides(options, dtype)
    report: Report = {
        "kind": "decode" if isinstance(options, Decode) else "prefill",
        "model": options.model,
        "dtype": dtype,
        "cache_dtype": sides[0].cache_dtype,
        "quantize": options.quantize,
        "kernels": sides[0].by_kernels,
        "peers": [side.name for side in sides[1:]],
        "repeats": options.repeats,
        **({"tokens": options.tokens, "cache_holds": _cache_holds(options)} if isinstance(options, Decode) else {}),
        "machine": {**describe(), "bandwidth": measured},
        "loaded": {side.name: dataclasses.asdict(side.loaded) for side in sides},
        "results": [],
    }
    for result in _cases(options, sides, measured["bytes_per_s"]):
        report["results"].append(result)
        write(report, options)
        _progress(result)
    if jax.default_backend() == "cpu":  # before or after, whichever was disturbed less
        measured = max(measured, machine.bandwidth(), key=lambda found: found["bytes_per_s"])
        report["machine"]["bandwidth"] = measured
        for read in (result["read"] for result in report["results"] if "read" in result):
            read["of_measured_bandwidth"] = read["bytes_per_s"] / measured["bytes_per_s"]
    write(report, options)
    return report


def write(report: Report, options: Decode | Prefill) -> None:
    """Writes the report where the options say."""
    tables = markdown(report)
    targets = {options.json: report, options.markdown: tables}
    if options.out is not None:
        name = file_name(report)
        targets |= {options.out / f"{name}.json": report, options.out / f"{name}.md": tables}
    for path, content in targets.items():
        if path is not None:
            write_file(path, content)


def file_name(report: Report) -> str:
    """Of a report's files: device, kind, model and storage."""
    model = slug(Path(report["model"]).name if os.path.sep in report["model"] else report["model"])
    return "-".join(filter(None, [slug(report["machine"]["device"]), report["kind"], model, report["quantize"]]))


def _sides(options: Decode | Prefill, dtype: str) -> list[Any]:
    make: dict[str, Callable[[], Any]] = {
        "transformers": lambda: Transformers(options.model, dtype),
        "reference": lambda: Ours(
            options.model, dtype, options.quantize, cache_dtype=options.cache_dtype, kernels="reference",
            name="reference",
        ),
        "unquantised": lambda: Ours(options.model, dtype, cache_dtype=options.cache_dtype, name="unquantised"),
    }  # fmt: skip
    ours = Ours(options.model, dtype, options.quantize, cache_dtype=options.cache_dtype)
    return [ours, *[make[name]() for name in dict.fromkeys(options.peer)]]


def _cache_holds(options: Decode) -> str:
    return "prompts" if "transformers" in options.peer else "random rows"


def _cases(options: Decode | Prefill, sides: list[Any], bandwidth: float) -> Iterator[Report]:
    decoding = isinstance(options, Decode)
    axis, text = ("context", options.context) if decoding else ("length", options.lengths)
    for batch in numbers(options.batch, "--batch"):
        for first, length in enumerate(numbers(text, f"--{axis}")):
            case = {"batch": batch, axis: length}
            try:
                _require_room(sides, batch, length, options.tokens if decoding else 0)
                if decoding:
                    found = _decode(options, sides, batch, length, bandwidth, first == 0)
                else:
                    found = _prefill(options, sides, batch, length)
            except CaseSkipped as reason:
                found = {"skipped": str(reason)}
            except (jax.errors.JaxRuntimeError, LaunchError, GlmError) as error:
                # What fails must not take the other cases with it.
                line = str(error).strip().partition("\n")[0][:300]
                found = {"skipped" if "RESOURCE_EXHAUSTED" in line else "failed": line}
            yield case | found


def _decode(options: Decode, sides: list[Any], batch: int, context: int, bandwidth: float, counted: bool) -> Report:
    ours, tokens = sides[0], options.tokens
    if _cache_holds(options) == "prompts":
        given = prompts(batch, context, ours.cfg.vocab_size)
        states = [side.start(given, tokens) for side in sides]
    else:
        states = [side.filled(batch, context, tokens) for side in sides]
    calls = [lambda s=side, at=state: s.decode(at, tokens) for side, state in zip(sides, states, strict=True)]
    seconds, compared = compare(sides, calls, options.repeats)
    result: Report = {
        side.name: {**of_decoding(taken, batch, tokens), "compile_s": round(side.compile_seconds, 3)}
        for side, taken in zip(sides, seconds, strict=True)
    }
    step = result[ours.name]["ms_per_token_of_one_row"]["median"] / 1e3
    result["read"] = _read(ours, batch, context, step, bandwidth)
    if options.details and jax.default_backend() == "gpu":
        if counted:  # which compiles once more
            result["compiled"] = ours.launches(states[0])
        if ran := profiled(lambda: ours.decode(states[0], tokens), tokens):
            result["profiled"] = ran
    return result | _alike(options, compared)


def _prefill(options: Prefill, sides: list[Any], batch: int, length: int) -> Report:
    given = prompts(batch, length, sides[0].cfg.vocab_size)
    calls = [lambda s=side: s.prefill(given) for side in sides]
    seconds, compared = compare(sides, calls, options.repeats)
    result: Report = {
        side.name: {**of_prompts(taken, batch, length), "compile_s": round(side.compile_seconds, 3)}
        for side, taken in zip(sides, seconds, strict=True)
    }
    if options.details and jax.default_backend() == "gpu" and (ran := profiled(calls[0], 1)):
        result["profiled"] = ran
    return result | _alike(options, compared)


def _alike(options: Decode | Prefill, compared: Report) -> Report:
    """Without the tokens of sides that hold other weights: random codes do not stand for the plain random weights."""
    if options.model.startswith(PREFIX):
        compared.get("same_tokens", {}).pop("unquantised", None)
    return compared


def _read(ours: Ours, batch: int, context: int, seconds: float, bandwidth: float) -> Report:
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
    bound = planned(ours, batch, context).bound_tokens_per_s
    if bound is None:
        return found
    speed = batch / seconds
    return found | {"bound_tokens_per_s_of_all_rows": bound, "of_bound": speed / bound}


def planned(ours: Ours, batch: int, context: int) -> MemoryPlan:
    """What ``python -m glm_jax.plan`` says of a case on this device."""
    device = jax.devices()[0]
    return plan(
        ours.cfg,
        device_bytes=device_limit(device),
        dtype=ours.dtype,
        storage=ours.storage,
        cache_dtype=ours.cache_dtype,
        context=min(context, ours.cfg.max_position_embeddings),
        sequences=batch,
        bandwidth=bandwidth_of(device),
        mtp=False,
        on_cpu=device.platform == "cpu",
    )


def _require_room(sides: Sequence[Any], batch: int, length: int, tokens: int) -> None:
    """Raises :class:`CaseSkipped` where the model knows no such length, or cache and workspace will not fit."""
    ours = [side for side in sides if isinstance(side, Ours)]
    cfg = ours[0].cfg
    if length + tokens + 1 > cfg.max_position_embeddings:
        raise CaseSkipped(f"longer than the model's {cfg.max_position_embeddings:,} tokens")
    rows, free = bucket(batch), device_limit(jax.devices()[0])
    chunk = 1 if tokens else min(PREFILL_CHUNK, max(16, PREFILL_TOKENS // rows))
    need = 0
    for side in ours:
        setup = planned(side, rows, length).setup
        room = slots(length, tokens) if tokens else bucket(length, 128)
        need += setup.need(rows, room).cache + workspace(cfg, setup.placement, rows, room, chunk).total
    if need > free:
        raise CaseSkipped(f"needs {in_gb(need)} for cache and workspace, and {in_gb(free)} are free")


def _progress(result: Report) -> None:
    length = result["context" if "context" in result else "length"]
    if why := result.get("skipped") or result.get("failed"):
        text = f"{'skipped' if 'skipped' in result else 'failed'}: {why}"
    else:
        speed = result["glm_jax"]["tokens_per_s_of_all_rows"]["median"]
        text = f"{speed:,.2f} tokens/s of all rows together"
    print(f"batch {result['batch']}, {short(length)} tokens: {text}", file=sys.stderr, flush=True)
