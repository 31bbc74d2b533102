"""Block sizes of the kernels of experts: what was measured on a card, and a rule for every other."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """How the work on pairs of token and expert is cut up.

    Attributes:
        block_m: rows of a program: 16, of which a pair fills one; the shared expert fills more.
        block_n: outputs of a program: 32 or 64.
        num_warps: of a program.
        num_stages: chunks in flight.
    """

    block_m: int = 16
    block_n: int = 32
    num_warps: int = 2
    num_stages: int = 4
