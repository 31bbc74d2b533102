"""Activation order: which group of inputs each column belongs to (``g_idx``)."""

from __future__ import annotations

import numpy as np

from glm_jax.checkpoint.formats.base import Array, QuantizedModule


def has_equal_groups(module: QuantizedModule, suffix: str, num_groups: int) -> bool:
    """Whether all groups have equally many columns. A damaged index counts as equal: loading will say what is wrong.

    This reads the index, 4 bytes per input, when a checkpoint is opened: it decides how the weight is stored.
    """
    index = module.read(suffix)
    if index.size % num_groups or index.min(initial=0) < 0 or index.max(initial=0) >= num_groups:
        return index.size % num_groups == 0
    return bool((np.bincount(index, minlength=num_groups) == index.size // num_groups).all())


def read_group_index(module: QuantizedModule, suffix: str, num_groups: int) -> Array:
    """The group of each column, int32 ``[I]``.

    Raises:
        CheckpointError: if one is out of range.
    """
    index = module.read(suffix)
    if index.min(initial=0) < 0 or index.max(initial=0) >= num_groups:
        raise module.error(f"{suffix} names groups outside 0 .. {num_groups - 1}: the file is damaged")
    return index
