"""Activation order: which group of inputs each column belongs to (``g_idx``)."""

from __future__ import annotations

import numpy as np

from glm_jax.checkpoint.formats.base import Array, Module


def equal_groups(module: Module, part: str, groups: int) -> bool:
    """Whether all groups have equally many columns. A damaged index counts as equal: loading will say what is wrong.

    This reads the index, 4 bytes per input, when a checkpoint is opened: it decides how the weight is stored.
    """
    index = module.read(part)
    if index.size % groups or index.min(initial=0) < 0 or index.max(initial=0) >= groups:
        return index.size % groups == 0
    return bool((np.bincount(index, minlength=groups) == index.size // groups).all())


def read_groups(module: Module, part: str, groups: int) -> Array:
    """The group of each column, int32 ``[I]``.

    Raises:
        CheckpointError: if one is out of range.
    """
    index = module.read(part)
    if index.min(initial=0) < 0 or index.max(initial=0) >= groups:
        raise module.error(f"{part} names groups outside 0 .. {groups - 1}: the file is damaged")
    return index
