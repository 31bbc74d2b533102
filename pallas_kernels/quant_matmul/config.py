"""Block sizes of products of few rows: the heuristic for cards without tuned sizes."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles import TILE_WIDTH


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """Block sizes of a product of few rows.

    Attributes:
        block_m: Rows of a program, 16 or more.
        block_n: Outputs of a program, 32 or 64.
        splits: Programs that share the inputs of one block of outputs (split-K).
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline that loads chunks.
    """

    block_m: int = 16
    block_n: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


def linear_heuristic(rows: int, outputs: int, chunks: int, multiprocessors: int) -> LinearConfig:
    """Splits the inputs until two programs run on each multiprocessor, as far as there are chunks.

    Args:
        rows: Rows of the activations.
        outputs: Outputs of the matrix.
        chunks: Chunks of its inputs.
        multiprocessors: Multiprocessors of the GPU.
    """
    block_m = 16 if rows <= 16 else 32
    block_n = 32 if -(-outputs // TILE_WIDTH) < multiprocessors else TILE_WIDTH
    blocks = -(-outputs // block_n) * -(-rows // block_m)
    splits = 1
    while blocks * splits < 2 * multiprocessors and splits < 8 and chunks // (2 * splits) >= 2:
        splits *= 2
    warps = 2 if block_n == 32 and block_m == 16 else 4
    return LinearConfig(block_m=block_m, block_n=block_n, splits=splits, num_warps=warps, num_stages=4)
