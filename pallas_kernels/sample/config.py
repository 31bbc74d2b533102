"""Block sizes of the sampler's kernels, the same for every GPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Block sizes of rows of logits.

    They decide in which order the probabilities of a row are added, so they may depend on nothing but its width.

    Attributes:
        block_v: Token ids of a program, a power of two; at most 1,024, so that 2^20 for each fits 32 bits.
        blocks_per_sum: Blocks that are added up at once.
        num_warps: Warps of a program.
    """

    block_v: int = 1024
    blocks_per_sum: int = 16
    num_warps: int = 4
