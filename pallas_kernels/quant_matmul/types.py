"""Results of a product that the next kernel reads."""

from __future__ import annotations

import dataclasses
import functools

import jax


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SumSqLayout:
    """The static part of a norm, as one constexpr of a kernel.

    Attributes:
        num_blocks: Blocks of columns that the normalized values span; 0 if there is no norm.
        first_block: First of these blocks.
        stride: Blocks of columns in a row of the partials.
        eps: Epsilon of the norm.
    """

    num_blocks: int = 0
    first_block: int = 0
    stride: int = 1
    eps: float = 0.0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["partials"], meta_fields=["first_block", "num_blocks"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class SumSq:
    """Partial sums of squares of rows, one for each block of columns, written by the kernel that computed the rows.

    They make an RMS norm free for its reader: ``1 / rms`` is known at once, and multiplies a product after the fact.

    Attributes:
        partials: ``float32 [M, blocks]``.
        first_block: First block of the columns that are normalized.
        num_blocks: Number of their blocks.
    """

    partials: jax.Array
    first_block: int
    num_blocks: int

    def layout(self, eps: float) -> SumSqLayout:
        """Returns the static part of the norm, for the kernels."""
        return SumSqLayout(
            num_blocks=self.num_blocks, first_block=self.first_block, stride=self.partials.shape[1], eps=eps
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class LinearOutput:
    """Result of a product, prepared for the norm that reads it.

    Attributes:
        out: ``[M, N]``.
        scaled: ``[M, N]``, ``out`` times the weight of the next norm but without its ``1 / rms``; ``out`` itself if
            there is no norm.
        sum_sq: Sums of squares of ``out``.
    """

    out: jax.Array
    scaled: jax.Array
    sum_sq: SumSq
