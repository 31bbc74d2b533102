"""Block sizes of the expert kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Block sizes of the expert kernels; the same defaults for every GPU.

    Attributes:
        block_m: Rows of a program: 16, of which an unsorted pair fills one and the shared expert as many as there are.
        block_n: Outputs of a program, 32 or 64.
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline that loads chunks.
    """

    block_m: int = 16
    block_n: int = 32
    num_warps: int = 2
    num_stages: int = 4
