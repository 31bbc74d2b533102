"""Timing sides in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glm_jax.bench.backend import BenchBackend

# Threads of the side that ran last may still be spinning.
_PAUSE_SECONDS = 0.3

TimedCall = Callable[[], tuple[float, Any]]


def random_prompts(batch: int, length: int, vocab: int) -> np.ndarray:
    """The same random prompts for every side, int32 ``[batch, length]``."""
    return np.random.default_rng(batch * 1_000_003 + length).integers(0, vocab, (batch, length), np.int32)


def time_interleaved(
    backends: Sequence[BenchBackend], calls: Sequence[TimedCall], repeats: int
) -> tuple[list[list[float]], dict[str, Any]]:
    """Runs every side once to warm up, and then in turn.

    Args:
        backends: the first is this program, the others its peers.
        calls: one for each: seconds taken, and tokens.
        repeats: turns.

    Returns:
        The seconds of each side, and what is compared: for every peer how many times as long it took as the first side
        (``ratio``), and the share of tokens that agree (``same_tokens``).
    """
    for side in backends:
        side.compile_seconds = 0.0
    outputs = [np.asarray(call()[1]) for call in calls]
    turns = [_time_each(calls) for _ in range(repeats)]
    seconds = [list(column) for column in zip(*turns, strict=True)]
    result: dict[str, Any] = {}
    if len(backends) > 1:
        names = [side.name for side in backends[1:]]
        result["ratio"] = {
            name: summarize([theirs / mine for mine, theirs in zip(seconds[0], other, strict=True)])
            for name, other in zip(names, seconds[1:], strict=True)
        }
        result["same_tokens"] = {
            name: float(np.mean(outputs[0][: len(other)] == other))
            for name, other in zip(names, outputs[1:], strict=True)
        }
    return seconds, result


def _time_each(calls: Sequence[TimedCall]) -> list[float]:
    seconds = []
    for call in calls:
        time.sleep(_PAUSE_SECONDS)
        seconds.append(call()[0])
    return seconds


def decode_metrics(seconds: Sequence[float], batch: int, tokens: int) -> dict[str, Any]:
    """Seconds for ``tokens`` steps as times and speeds, of one row and of all."""
    return {
        "ms_per_token_of_one_row": summarize([1e3 * s / tokens for s in seconds]),
        "tokens_per_s_of_one_row": summarize([tokens / s for s in seconds]),
        "tokens_per_s_of_all_rows": summarize([batch * tokens / s for s in seconds]),
    }


def prefill_metrics(seconds: Sequence[float], batch: int, length: int) -> dict[str, Any]:
    """Seconds for prompts of ``length`` tokens, all together, as times and speeds."""
    return {
        "ms_for_all_prompts": summarize([1e3 * s for s in seconds]),
        "tokens_per_s_of_all_rows": summarize([batch * length / s for s in seconds]),
    }


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest, and the values themselves in the order they were measured."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": [round(value, 4) for value in values],
    }
