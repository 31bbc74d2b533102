"""Block sizes of the sampler's kernels: a rule for every card."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """How rows of logits are cut up.

    It decides in which order the probabilities of a row are added, so it may depend on nothing but the row's width.

    Attributes:
        block_v: ids of a program, a power of two; 1,024 at most, so that 2^20 for each fits 32 bits.
        blocks_per_sum: shares that are added up together.
        num_warps: of a program.
    """

    block_v: int = 1024
    blocks_per_sum: int = 16
    num_warps: int = 4
