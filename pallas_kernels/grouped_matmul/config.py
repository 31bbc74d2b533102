"""Block sizes of the products of many rows: what was measured on a card, and a rule for every other."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles import TILE_WIDTH

_LARGE_SHARED_MEMORY = 200_000
_BLOCK_MS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMatmulConfig:
    """How a product with many rows is cut up.

    Attributes:
        block_m: rows of a program, which share each block of weights that is turned into numbers.
        block_n: outputs of a program: 32, or a multiple of 64.
        num_warps: of a program.
        num_stages: chunks in flight.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2


def block_m_heuristic(rows: int, groups: int) -> int:
    """Rows of a block, for so many rows in groups: more than half of them full if the groups are alike."""
    mean = rows / groups
    return next((height for height in _BLOCK_MS if height >= mean), _BLOCK_MS[-1])


def grouped_matmul_heuristic(block_m: int, num_tiles: int, shared_memory: int) -> GroupedMatmulConfig:
    """For a product with one matrix.

    Args:
        block_m: rows of a block.
        num_tiles: of 64 outputs, in the matrix.
        shared_memory: bytes of it that a program may have.
    """
    if block_m < _BLOCK_MS[-1]:
        return GroupedMatmulConfig(block_m=block_m, num_warps=4)
    if shared_memory < _LARGE_SHARED_MEMORY:
        return GroupedMatmulConfig(block_m=block_m)
    return GroupedMatmulConfig(block_m=block_m, block_n=TILE_WIDTH if num_tiles % 2 else 2 * TILE_WIDTH, num_stages=3)


def gated_linear_unit_heuristic(block_m: int, shared_memory: int) -> GroupedMatmulConfig:
    """For a product with two matrices at once; where tensor cores take operands from registers, these fill up."""
    warps = 8 if block_m == _BLOCK_MS[-1] else 4
    if shared_memory < _LARGE_SHARED_MEMORY:
        return GroupedMatmulConfig(block_m=block_m, block_n=TILE_WIDTH // 2, num_warps=warps)
    return GroupedMatmulConfig(block_m=block_m, num_warps=warps, num_stages=3)
