"""Timing two sides in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glm_jax.bench.side import Side

# Threads of the side that ran last may still be spinning.
_PAUSE_SECONDS = 0.3


def prompts(batch: int, length: int, vocab: int) -> np.ndarray:
    """The same random prompts for every side, int32 ``[batch, length]``."""
    return np.random.default_rng(batch * 1_000_003 + length).integers(0, vocab, (batch, length), np.int32)


def decode_case(
    sides: Sequence[Side], batch: int, context: int, tokens: int, vocab: int, repeats: int
) -> dict[str, Any]:
    """Greedy decoding of ``tokens`` tokens after ``context`` tokens, in each of ``batch`` rows."""
    given = prompts(batch, context, vocab)
    states = [side.start(given, tokens) for side in sides]
    calls = [lambda s=side, state=state: s.decode(state, tokens) for side, state in zip(sides, states, strict=True)]
    return {"batch": batch, **_compare(sides, calls, batch * tokens, repeats)}


def prefill_case(sides: Sequence[Side], batch: int, length: int, vocab: int, repeats: int) -> dict[str, Any]:
    """Prompts of ``length`` tokens, in each of ``batch`` rows, into a new cache."""
    given = prompts(batch, length, vocab)
    calls = [lambda s=side: s.prefill(given) for side in sides]
    return {"batch": batch, "length": length, **_compare(sides, calls, given.size, repeats)}


def _compare(
    sides: Sequence[Side], calls: Sequence[Callable[[], tuple[float, Any]]], tokens: int, repeats: int
) -> dict[str, Any]:
    for side in sides:
        side.compile_seconds = 0.0
    outputs = [np.asarray(call()[1]) for call in calls]  # warm-up
    seconds = [_in_turn(calls) for _ in range(repeats)]
    rates = [[tokens / s for s in column] for column in zip(*seconds, strict=True)]
    result: dict[str, Any] = {
        side.name: {"tokens_per_s": spread(rate), "compile_s": round(side.compile_seconds, 3)}
        for side, rate in zip(sides, rates, strict=True)
    }
    if len(sides) == 2:
        result["ratio"] = spread([a / b for a, b in zip(*rates, strict=True)])
        result["same_tokens"] = float(np.mean(outputs[0][: len(outputs[1])] == outputs[1]))
    return result


def _in_turn(calls: Sequence[Callable[[], tuple[float, Any]]]) -> list[float]:
    seconds = []
    for call in calls:
        time.sleep(_PAUSE_SECONDS)
        seconds.append(call()[0])
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest, and the values themselves in the order they were measured."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": [round(value, 4) for value in values],
    }
