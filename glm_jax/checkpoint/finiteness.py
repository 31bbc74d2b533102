"""Finds NaN and infinite values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK_VALUES = 1 << 22  # values checked at once


def count_nonfinite(array: Array) -> int:
    """Returns the number of NaN and infinite values of an array of any dtype; integers have none."""
    if not np.issubdtype(array.dtype, np.inexact) and array.dtype != FLOAT_DTYPES["bfloat16"]:
        return 0
    array = np.atleast_1d(array)
    rows = max(1, _BLOCK_VALUES * len(array) // max(1, array.size))
    blocks = (array[start : start + rows] for start in range(0, len(array), rows))
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)


def require_finite(values: Array | jax.Array, leaf: Leaf) -> None:
    """Checks weights before they are quantized, because integers would hide a NaN or an infinity.

    Args:
        values: Weights, in any float dtype and of any shape.
        leaf: Array that they belong to.

    Raises:
        CheckpointError: if a value is not finite; names the array.
    """
    if not bool(jnp.isfinite(jnp.max(jnp.abs(jnp.asarray(values))))):
        raise CheckpointError(
            f"{leaf.checkpoint_name}/{leaf.name} holds weights that are NaN or infinite, which cannot be quantized: "
            "the checkpoint is damaged"
        )
