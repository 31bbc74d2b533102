"""How experts are selected, and the pairs of tokens and experts."""

from __future__ import annotations

import dataclasses
import functools

import jax


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How the router selects experts, also as one constexpr of the kernels.

    Attributes:
        experts: E, number of routed experts.
        experts_per_token: X, experts selected for a token; 0 for a feed-forward with the shared expert alone.
        normalize_weights: Whether the weights of a token are normalized to sum to one.
        scaling_factor: Factor of the weights after normalization.
    """

    experts: int
    experts_per_token: int
    normalize_weights: bool
    scaling_factor: float


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["expert_ids", "weights", "block_sizes", "pair_ids"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Dispatch:
    """The (token, expert) pairs in blocks of one expert each; pair ``m * X + i`` is token m with its i-th expert.

    Attributes:
        expert_ids: ``int32 [blocks]``, expert of each block.
        weights: ``float32 [M * X]``, router weights of the pairs.
        block_sizes: ``int32 [blocks]``, number of pairs in each block; ``None`` if every pair is a block.
        pair_ids: ``int32 [blocks, 16]``, pairs of each block; ``None`` if every pair is a block.
    """

    expert_ids: jax.Array
    weights: jax.Array
    block_sizes: jax.Array | None = None
    pair_ids: jax.Array | None = None

    @property
    def is_sorted(self) -> bool:
        """Whether blocks hold several pairs, sorted by expert."""
        return self.pair_ids is not None
