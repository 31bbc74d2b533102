"""Means, intervals and comparisons of what was measured, in NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from glm_jax.errors import GlmError

Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[float, float, float]

_CONFIDENCE_LEVEL = 0.95
_DRAWS_PER_BATCH = 1 << 22  # numbers of units drawn at once


def paired_bootstrap(a: Any, b: Any, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean difference ``a - b`` with its 95 % interval, by drawing units anew.

    Tokens of one window depend on each other, and an interval from tokens drawn one by one would be too narrow. So
    whole units are drawn, with replacement, and the same ones of ``a`` and ``b``.

    Args:
        a: ``[units, ...]``: one number per unit, or all those of a window. NaN is padding.
        b: the same for what it is compared with; NaN in the same places.
        resamples: how often to draw.
        seed: of the draws.

    Returns:
        The difference of the means over all numbers, and the 2.5 and 97.5 percentiles of it over the resamples.

    Raises:
        GlmError: if the shapes or the paddings differ, or nothing but padding is there.
    """
    a, b = _pair(a, b)
    return bootstrap_mean(a - b, resamples, seed)


def bootstrap_mean(values: Any, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of ``[units, ...]`` (NaN is padding) with its 95 % interval, by drawing units anew."""
    sums, counts = _unit_totals(np.asarray(values, np.float64))
    means = np.concatenate([w @ sums / (w @ counts) for w in _resample_counts(counts, resamples, seed)])
    return float(sums.sum() / counts.sum()), *_interval_bounds(means)


def paired_ratio(a: Any, b: Any, resamples: int = 10_000, seed: int = 0) -> Interval | None:
    """Ratio of the means ``a / b`` with its 95 % interval, as :func:`paired_bootstrap`; None if b's mean can be 0."""
    a, b = _pair(a, b)
    (above, counts), (below, _) = _unit_totals(a), _unit_totals(b)
    ratios = []
    for weights in _resample_counts(counts, resamples, seed):
        bottom = weights @ below
        if not bottom.all():
            return None
        ratios.append(weights @ above / bottom)
    return float(above.sum() / below.sum()), *_interval_bounds(np.concatenate(ratios))


def summarize_distribution(values: Array) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of the numbers that are not NaN."""
    there = values[~np.isnan(values)].astype(np.float64)
    median, high = np.quantile(there, (0.5, 0.99))
    return {"mean": float(there.mean()), "median": float(median), "p99": float(high), "max": float(there.max())}


def _pair(a: Any, b: Any) -> tuple[Array, Array]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        raise GlmError(f"only measurements of the same tokens can be compared, not {a.shape} with {b.shape}")
    return a, b


def _unit_totals(values: Array) -> tuple[Array, Array]:
    """Sum and count of each unit, without those that have nothing."""
    flat = values.reshape(len(values), -1)
    counts = (~np.isnan(flat)).sum(axis=1)
    if not counts.any():
        raise GlmError("there is nothing to take the mean of: no number was measured")
    return np.nansum(flat, axis=1)[counts > 0], counts[counts > 0].astype(np.float64)


def _resample_counts(counts: Array, resamples: int, seed: int) -> list[Array]:
    """How often each unit is drawn, ``[resamples, units]`` in parts."""
    units, rng = len(counts), np.random.default_rng(seed)
    together = max(1, _DRAWS_PER_BATCH // units)
    parts = [min(together, resamples - start) for start in range(0, resamples, together)]
    return [rng.multinomial(units, np.full(units, 1 / units), size=part).astype(np.float64) for part in parts]


def _interval_bounds(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - _CONFIDENCE_LEVEL) / 2, (1 + _CONFIDENCE_LEVEL) / 2))
    return float(low), float(high)
