"""Slices of stacked arrays by traced indices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Index = jax.Array | int


class Rows(NamedTuple):
    """``size`` entries of an axis from a traced ``start``."""

    start: Index
    size: int


def take(stack: jax.Array, index: tuple[Index | Rows, ...]) -> jax.Array:
    """``stack[index]`` with traced indices on the leading axes; a :class:`Rows` keeps its axis."""
    if all(isinstance(i, int) for i in index):
        return stack[index]
    # One slice for all axes: a slice of a slice would copy the outer one.
    inner = stack.shape[len(index) :]
    starts = [jnp.asarray(i.start if isinstance(i, Rows) else i, jnp.int32) for i in index]
    sizes = [i.size if isinstance(i, Rows) else 1 for i in index]
    kept = [i.size for i in index if isinstance(i, Rows)]
    sliced = jax.lax.dynamic_slice(stack, [*starts, *[jnp.int32(0)] * len(inner)], (*sizes, *inner))
    return sliced.reshape(*kept, *inner)
