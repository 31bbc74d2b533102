"""Blocks of rows that share a matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax


class RowBlocks(NamedTuple):
    """Rows in blocks of equal height, each with a matrix of its own.

    Attributes:
        expert_ids: ``int32 [blocks]``, index of each block's matrix; -1 for a block without rows.
        row_ids: ``int32 [blocks, height]``, rows of each block; -1 pads a block.
    """

    expert_ids: jax.Array
    row_ids: jax.Array
