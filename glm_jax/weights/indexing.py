"""Slices of stacked arrays by traced indices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Index = jax.Array | int


class RowSlice(NamedTuple):
    """``size`` consecutive entries of an axis, from a possibly traced ``start``."""

    start: Index
    size: int


def take_slice(stack: jax.Array, index: tuple[Index | RowSlice, ...]) -> jax.Array:
    """``stack[index]`` with traced indices on the leading axes; a :class:`RowSlice` keeps its axis."""
    if all(isinstance(i, int) for i in index):
        return stack[index]
    # One slice for all axes: a slice of a slice would copy the outer one.
    inner = stack.shape[len(index) :]
    starts = [jnp.asarray(i.start if isinstance(i, RowSlice) else i, jnp.int32) for i in index]
    sizes = [i.size if isinstance(i, RowSlice) else 1 for i in index]
    kept = [i.size for i in index if isinstance(i, RowSlice)]
    sliced = jax.lax.dynamic_slice(stack, [*starts, *[jnp.int32(0)] * len(inner)], (*sizes, *inner))
    return sliced.reshape(*kept, *inner)


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``."""
    return next(n for n in range(min(size, limit), 0, -1) if size % n == 0)
