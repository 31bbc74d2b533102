"""Runs the cases of a benchmark: every combination of batch size and length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from glm_jax.bench.backend import BenchBackend
from glm_jax.bench.glm_jax_backend import GlmJaxBackend, cache_capacity
from glm_jax.bench.options import DecodeOptions, PrefillOptions
from glm_jax.bench.profiler import profile_operations
from glm_jax.bench.report_tables import CaseResult
from glm_jax.bench.timing import (
    PeerComparison,
    TimingSummary,
    decode_metrics,
    prefill_metrics,
    random_prompts,
    time_interleaved,
)
from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX
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
from pallas_kernels import LaunchError
from pallas_kernels.report_format import parse_sizes

Peers = Sequence[BenchBackend[Any]]


class CaseSkipped(Exception):
    """Raised for a case that cannot run here; the message is the reason."""


def run_cases(
    options: DecodeOptions | PrefillOptions, own: GlmJaxBackend, peers: Peers, bandwidth: float
) -> Iterator[CaseResult]:
    """Yields the result of each case; a case that fails does not stop the others.

    Args:
        options: Options of the command.
        own: glm-jax.
        peers: Models that it is compared with.
        bandwidth: Measured memory bandwidth in bytes per second.
    """
    is_decode = isinstance(options, DecodeOptions)
    axis, lengths = ("context", options.context) if is_decode else ("length", options.lengths)
    for batch in parse_size_option(options.batch, "--batch"):
        for i, length in enumerate(parse_size_option(lengths, f"--{axis}")):
            result: CaseResult = {"batch": batch, axis: length}
            try:
                _require_memory(own, peers, batch, length, options.tokens if is_decode else 0)
                if is_decode:
                    result |= _run_decode_case(options, own, peers, batch, length, bandwidth, count_launches=i == 0)
                else:
                    result |= _run_prefill_case(options, own, peers, batch, length)
            except CaseSkipped as reason:
                result["skipped"] = str(reason)
            except (jax.errors.JaxRuntimeError, LaunchError, GlmError) as error:
                line = str(error).strip().partition("\n")[0][:300]
                result["skipped" if "RESOURCE_EXHAUSTED" in line else "failed"] = line
            yield result


def _run_decode_case(
    options: DecodeOptions,
    own: GlmJaxBackend,
    peers: Peers,
    batch: int,
    context: int,
    bandwidth: float,
    *,
    count_launches: bool,
) -> CaseResult:
    backends, tokens = [own, *peers], options.tokens
    if cache_contents(options) == "prompts":
        prompts = random_prompts(batch, context, own.cfg.vocab_size)
        states = [backend.start(prompts, tokens) for backend in backends]
    else:
        states = [
            backend.start_with_random_cache(batch, context, tokens)
            for backend in backends
            if isinstance(backend, GlmJaxBackend)
        ]
    calls = [
        lambda backend=backend, state=state: backend.decode(state, tokens)
        for backend, state in zip(backends, states, strict=True)
    ]
    seconds, comparison = time_interleaved(backends, calls, options.repeats)
    metrics = [decode_metrics(times, batch, tokens) for times in seconds]
    result = _with_compile_times(backends, metrics)
    step_seconds = metrics[0]["ms_per_token_of_one_row"]["median"] / 1e3
    result["read"] = _bandwidth_metrics(own, batch, context, step_seconds, bandwidth)
    if options.details and jax.default_backend() == "gpu":
        if count_launches:  # only once per batch size, because it compiles again
            result["compiled"] = own.compile_stats(states[0])
        if profile := profile_operations(calls[0], tokens):
            result["profiled"] = profile
    return {**result, **_drop_incomparable_tokens(options, comparison)}


def _run_prefill_case(options: PrefillOptions, own: GlmJaxBackend, peers: Peers, batch: int, length: int) -> CaseResult:
    backends = [own, *peers]
    prompts = random_prompts(batch, length, own.cfg.vocab_size)
    calls = [lambda backend=backend: backend.prefill(prompts) for backend in backends]
    seconds, comparison = time_interleaved(backends, calls, options.repeats)
    result = _with_compile_times(backends, [prefill_metrics(times, batch, length) for times in seconds])
    if options.details and jax.default_backend() == "gpu" and (profile := profile_operations(calls[0], 1)):
        result["profiled"] = profile
    return {**result, **_drop_incomparable_tokens(options, comparison)}


def cache_contents(options: DecodeOptions) -> str:
    """Returns what the cache holds before decoding; transformers can fill its cache only with a prompt."""
    return "prompts" if "transformers" in options.peer else "random rows"


def _with_compile_times(backends: Peers, metrics: Sequence[Mapping[str, TimingSummary]]) -> CaseResult:
    return {
        backend.name: {**of_backend, "compile_s": round(backend.compile_seconds, 3)}
        for backend, of_backend in zip(backends, metrics, strict=True)
    }


def _drop_incomparable_tokens(options: DecodeOptions | PrefillOptions, comparison: PeerComparison) -> PeerComparison:
    """Drops the tokens of a peer with other weights: quantized weights of a synthetic model are random themselves."""
    if options.model.startswith(SYNTHETIC_PREFIX):
        comparison.get("same_tokens", {}).pop("unquantized", None)
    return comparison


def _bandwidth_metrics(
    own: GlmJaxBackend, batch: int, context: int, seconds: float, bandwidth: float
) -> dict[str, float | str]:
    """Returns the bytes of a step, the bandwidth that it achieved, and the fraction of the possible bandwidth."""
    nbytes = own.bytes_per_step(batch, context)
    metrics: dict[str, float | str] = {
        "bytes_per_step": nbytes,
        "bytes_per_token": round(nbytes / batch),
        "experts": "those chosen" if batch == 1 else "as many as uniform routing chooses",
        "bytes_per_s": nbytes / seconds,
        "of_measured_bandwidth": nbytes / seconds / bandwidth,
    }
    bound = plan_case(own, batch, context).bound_tokens_per_s
    if bound is not None:
        metrics |= {"bound_tokens_per_s_of_all_rows": bound, "of_bound": batch / seconds / bound}
    return metrics


def plan_case(own: GlmJaxBackend, batch: int, context: int) -> MemoryPlan:
    """Returns the plan that ``python -m glm_jax.plan`` makes for a case on this device."""
    device = jax.devices()[0]
    return plan_memory(
        own.cfg,
        device_bytes=available_device_memory(device),
        dtype=own.dtype,
        storage=own.storage,
        cache_dtype=own.cache_dtype,
        context=min(context, own.cfg.max_position_embeddings),
        sequences=batch,
        bandwidth=device_bandwidth(device),
        mtp=False,
        on_cpu=device.platform == "cpu",
    )


def _require_memory(own: GlmJaxBackend, peers: Peers, batch: int, length: int, tokens: int) -> None:
    """Checks that the model supports the length, and that cache and workspace fit.

    Raises:
        CaseSkipped: if not.
    """
    cfg = own.cfg
    if length + tokens + 1 > cfg.max_position_embeddings:
        raise CaseSkipped(f"longer than the model's {cfg.max_position_embeddings:,} tokens")
    sequences, free = bucket_size(batch), available_device_memory(jax.devices()[0])
    chunk = 1 if tokens else min(PREFILL_CHUNK_SIZE, max(16, MAX_BATCHED_PREFILL_TOKENS // sequences))
    slots = cache_capacity(length, tokens) if tokens else bucket_size(length, 128)
    required = 0
    for backend in [own, *(peer for peer in peers if isinstance(peer, GlmJaxBackend))]:
        model = plan_case(backend, sequences, length).memory_model
        required += model.requirement(sequences, slots).cache
        required += estimate_workspace(cfg, model.placement, sequences, slots, chunk).total
    if required > free:
        raise CaseSkipped(f"needs {format_bytes(required)} for cache and workspace, and {format_bytes(free)} are free")


def parse_size_option(text: str, name: str) -> tuple[int, ...]:
    """Parses positive numbers such as ``1,8k``, separated by commas, where k stands for 1,024.

    Args:
        text: Value of the option.
        name: Name of the option, for the message.

    Raises:
        GlmError: if the text is anything else.
    """
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise GlmError(f"{name} must be {error}") from None
