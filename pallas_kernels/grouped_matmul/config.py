"""Block sizes of products of many rows: the heuristics for cards without tuned sizes."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles import TILE_WIDTH

_LARGE_SHARED_MEMORY = 200_000
_BLOCK_MS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMatmulConfig:
    """Block sizes of a product of many rows.

    Attributes:
        block_m: Rows of a program, which share each dequantized block of weights.
        block_n: Outputs of a program: 32, or a multiple of 64.
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline that loads chunks.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2


def choose_block_m(rows: int, groups: int) -> int:
    """Returns the height of row blocks for rows in equal groups; more than half of each block is then filled."""
    mean = rows / groups
    return next((height for height in _BLOCK_MS if height >= mean), _BLOCK_MS[-1])


def grouped_matmul_heuristic(block_m: int, num_tiles: int, shared_memory: int) -> GroupedMatmulConfig:
    """Returns block sizes of a product with one matrix.

    Args:
        block_m: Rows of a block.
        num_tiles: Tiles of 64 outputs in the matrix.
        shared_memory: Bytes of shared memory that a program may request.
    """
    if block_m < _BLOCK_MS[-1]:
        return GroupedMatmulConfig(block_m=block_m, num_warps=4)
    if shared_memory < _LARGE_SHARED_MEMORY:
        return GroupedMatmulConfig(block_m=block_m)
    return GroupedMatmulConfig(block_m=block_m, block_n=TILE_WIDTH if num_tiles % 2 else 2 * TILE_WIDTH, num_stages=3)


def gated_linear_unit_heuristic(block_m: int, shared_memory: int) -> GroupedMatmulConfig:
    """Returns block sizes of a product with two matrices at once.

    Blocks are narrower where tensor cores take operands from registers, which two matrices fill.
    """
    warps = 8 if block_m == _BLOCK_MS[-1] else 4
    if shared_memory < _LARGE_SHARED_MEMORY:
        return GroupedMatmulConfig(block_m=block_m, block_n=TILE_WIDTH // 2, num_warps=warps)
    return GroupedMatmulConfig(block_m=block_m, num_warps=warps, num_stages=3)
