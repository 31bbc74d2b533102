"""Times backends alternately, and summarizes the times as speeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from glm_jax.bench.backend import BenchBackend

# Threads of the backend that ran last may still be spinning.
_PAUSE_SECONDS = 0.3

TimedCall = Callable[[], tuple[float, np.ndarray]]


class TimingSummary(TypedDict):
    """Summary of repeated measurements.

    Attributes:
        median: Median.
        min: Smallest value.
        max: Largest value.
        all: All values in the order of measurement.
    """

    median: float
    min: float
    max: float
    all: list[float]


class PeerComparison(TypedDict, total=False):
    """Comparison of the peers with glm-jax; empty if there are no peers.

    Attributes:
        ratio: Time of each peer over the time of glm-jax, by name.
        same_tokens: Fraction of tokens on which each peer agrees with glm-jax, by name.
    """

    ratio: dict[str, TimingSummary]
    same_tokens: dict[str, float]


def random_prompts(batch: int, length: int, vocab_size: int) -> np.ndarray:
    """Returns random prompts ``int32 [B, T]``, the same in every call with these arguments."""
    return np.random.default_rng(batch * 1_000_003 + length).integers(0, vocab_size, (batch, length), np.int32)


def time_interleaved(
    backends: Sequence[BenchBackend[Any]], calls: Sequence[TimedCall], repeats: int
) -> tuple[list[list[float]], PeerComparison]:
    """Runs every backend once to warm up, and then all of them alternately.

    Args:
        backends: glm-jax first, then its peers.
        calls: One call for each backend, which returns seconds and tokens.
        repeats: Number of rounds.

    Returns:
        The seconds of each backend by round, and the comparison of the peers.
    """
    for backend in backends:
        backend.compile_seconds = 0.0
    outputs = [call()[1] for call in calls]
    rounds = [_time_round(calls) for _ in range(repeats)]
    own_seconds, *peer_seconds = seconds = [list(column) for column in zip(*rounds, strict=True)]
    comparison: PeerComparison = {}
    if names := [backend.name for backend in backends[1:]]:
        comparison["ratio"] = {
            name: summarize([peer / own for own, peer in zip(own_seconds, times, strict=True)])
            for name, times in zip(names, peer_seconds, strict=True)
        }
        comparison["same_tokens"] = {
            name: float(np.mean(outputs[0][: len(tokens)] == tokens))
            for name, tokens in zip(names, outputs[1:], strict=True)
        }
    return seconds, comparison


def _time_round(calls: Sequence[TimedCall]) -> list[float]:
    seconds = []
    for call in calls:
        time.sleep(_PAUSE_SECONDS)
        seconds.append(call()[0])
    return seconds


def decode_metrics(seconds: Sequence[float], batch: int, tokens: int) -> dict[str, TimingSummary]:
    """Returns times and speeds, per sequence and of the whole batch, from the seconds for ``tokens`` decode steps."""
    return {
        "ms_per_token_of_one_row": summarize([1e3 * s / tokens for s in seconds]),
        "tokens_per_s_of_one_row": summarize([tokens / s for s in seconds]),
        "tokens_per_s_of_all_rows": summarize([batch * tokens / s for s in seconds]),
    }


def prefill_metrics(seconds: Sequence[float], batch: int, length: int) -> dict[str, TimingSummary]:
    """Returns times and speeds of the whole batch from the seconds for prompts of ``length`` tokens."""
    return {
        "ms_for_all_prompts": summarize([1e3 * s for s in seconds]),
        "tokens_per_s_of_all_rows": summarize([batch * length / s for s in seconds]),
    }


def summarize(values: Sequence[float]) -> TimingSummary:
    """Returns median, minimum, maximum, and the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": [round(value, 4) for value in values],
    }
