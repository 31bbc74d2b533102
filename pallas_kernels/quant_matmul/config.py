"""Block sizes of the matrix kernels: what was measured on a card, and a rule for every other."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles import TILE_WIDTH


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """How a product with few rows is cut up.

    Attributes:
        block_m: rows of a program, 16 or more.
        block_n: outputs of a program: 32 or 64.
        splits: programs that share the inputs of one block of outputs.
        num_warps: of a program.
        num_stages: chunks in flight.
    """

    block_m: int = 16
    block_n: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


def linear_heuristic(rows: int, outputs: int, chunks: int, multiprocessors: int) -> LinearConfig:
    """Enough programs to have two on each multiprocessor, as far as the inputs can be split.

    Args:
        rows: of the activations.
        outputs: of the matrix.
        chunks: of its inputs.
        multiprocessors: of the card.
    """
    block_m = 16 if rows <= 16 else 32
    block_n = 32 if -(-outputs // TILE_WIDTH) < multiprocessors else TILE_WIDTH
    blocks = -(-outputs // block_n) * -(-rows // block_m)
    splits = 1
    while blocks * splits < 2 * multiprocessors and splits < 8 and chunks // (2 * splits) >= 2:
        splits *= 2
    warps = 2 if block_n == 32 and block_m == 16 else 4
    return LinearConfig(block_m=block_m, block_n=block_n, splits=splits, num_warps=warps, num_stages=4)
