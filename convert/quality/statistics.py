"""Means, confidence intervals and paired comparisons of measurements; needs NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from glm_jax.errors import GlmError

Array = np.ndarray[Any, np.dtype[Any]]
Estimate = tuple[float, float, float]  # value, and both ends of its 95 % interval

_CONFIDENCE_LEVEL = 0.95
_COUNTS_PER_BATCH = 1 << 22  # resample counts held in memory at once


def paired_bootstrap(a: Any, b: Any, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Estimates the mean difference ``a - b`` with its 95 % interval by a paired bootstrap over units.

    Tokens of one window depend on each other, so resampling single tokens would make the interval too narrow. Whole
    units are resampled with replacement, the same ones of ``a`` and ``b``.

    Args:
        a: Measurements ``[units, ...]``: one number per unit, or all numbers of a window. NaN is padding.
        b: Measurements to compare with, with the same shape and padding.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The difference of the means over all numbers, and its 2.5 and 97.5 percentiles over the resamples.

    Raises:
        GlmError: if shapes or padding differ, or all numbers are padding.
    """
    a, b = _pair(a, b)
    return bootstrap_mean(a - b, resamples, seed)


def bootstrap_mean(values: Any, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Estimates the mean of ``[units, ...]`` (NaN is padding) with its 95 % interval by a bootstrap over units."""
    sums, counts = _unit_totals(np.asarray(values, np.float64))
    means = np.concatenate([w @ sums / (w @ counts) for w in _resample_counts(counts, resamples, seed)])
    return float(sums.sum() / counts.sum()), *_interval_bounds(means)


def paired_ratio(a: Any, b: Any, resamples: int = 10_000, seed: int = 0) -> Estimate | None:
    """Estimates the ratio of means ``a / b`` like :func:`paired_bootstrap`; ``None`` if a resampled mean of b is 0."""
    a, b = _pair(a, b)
    (sums_a, counts), (sums_b, _) = _unit_totals(a), _unit_totals(b)
    ratios = []
    for weights in _resample_counts(counts, resamples, seed):
        denominators = weights @ sums_b
        if not denominators.all():
            return None
        ratios.append(weights @ sums_a / denominators)
    return float(sums_a.sum() / sums_b.sum()), *_interval_bounds(np.concatenate(ratios))


def summarize_distribution(values: Array) -> dict[str, float]:
    """Returns mean, median, 99th percentile and maximum of the values that are not NaN."""
    valid = values[~np.isnan(values)].astype(np.float64)
    median, high = np.quantile(valid, (0.5, 0.99))
    return {"mean": float(valid.mean()), "median": float(median), "p99": float(high), "max": float(valid.max())}


def _pair(a: Any, b: Any) -> tuple[Array, Array]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        raise GlmError(f"only measurements of the same tokens can be compared, not {a.shape} with {b.shape}")
    return a, b


def _unit_totals(values: Array) -> tuple[Array, Array]:
    """Returns sum and count of each unit; drops units that are all padding."""
    flat = values.reshape(len(values), -1)
    counts = (~np.isnan(flat)).sum(axis=1)
    if not counts.any():
        raise GlmError("there is nothing to take the mean of: no number was measured")
    return np.nansum(flat, axis=1)[counts > 0], counts[counts > 0].astype(np.float64)


def _resample_counts(counts: Array, resamples: int, seed: int) -> list[Array]:
    """Returns how often each resample contains each unit, ``float64 [resamples, units]``, in batches of resamples."""
    units, rng = len(counts), np.random.default_rng(seed)
    batch_size = max(1, _COUNTS_PER_BATCH // units)
    sizes = [min(batch_size, resamples - start) for start in range(0, resamples, batch_size)]
    return [rng.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64) for size in sizes]


def _interval_bounds(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - _CONFIDENCE_LEVEL) / 2, (1 + _CONFIDENCE_LEVEL) / 2))
    return float(low), float(high)
