"""Dispatch of (token, expert) pairs: sorted by expert into blocks of equal height."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BlockDispatch(NamedTuple):
    """Pairs sorted by expert into blocks of equal height, each of one expert.

    Attributes:
        expert_ids: ``int32 [blocks]``, the expert of each block, or -1 for an unused block.
        pair_ids: ``int32 [blocks, height]``, the pairs in each block, or -1 for padding.
        pair_slots: ``int32 [pairs]``, the position of each pair in the flattened blocks.
    """

    expert_ids: jax.Array
    pair_ids: jax.Array
    pair_slots: jax.Array


def dispatch_to_blocks(expert_of_pair: jax.Array, num_experts: int, block_size: int | None = None) -> BlockDispatch:
    """Sorts pairs by expert into blocks.

    Args:
        expert_of_pair: ``int32 [n * X]``. Pairs with an expert past the end are left out; their slot is 0.
        num_experts: Number of experts.
        block_size: Pairs of a block; by default a size that suits a CPU.
    """
    pairs = expert_of_pair.shape[0]
    block_size = block_size or min(64, max(8, 1 << (max(pairs // num_experts, 1) - 1).bit_length()))
    num_blocks = min(pairs, num_experts + pairs // block_size)
    blocks_of_expert = -(-_counts(expert_of_pair, num_experts) // block_size)
    first_block = jnp.cumsum(blocks_of_expert) - blocks_of_expert
    is_local = expert_of_pair < num_experts
    slot_of_block = first_block[jnp.where(is_local, expert_of_pair, 0)] * block_size
    slot = slot_of_block + rank_in_expert(expert_of_pair, num_experts)
    slot = jnp.where(is_local, slot, num_blocks * block_size)
    table = jnp.full(num_blocks * block_size, -1, jnp.int32)
    table = table.at[slot].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop").reshape(num_blocks, block_size)
    first = table[:, 0]
    expert_ids = jnp.where(first >= 0, expert_of_pair[jnp.maximum(first, 0)], -1)
    return BlockDispatch(expert_ids, table, jnp.where(is_local, slot, 0))


def rank_in_expert(expert_of_pair: jax.Array, num_experts: int) -> jax.Array:
    """Number of earlier pairs with the same expert, ``int32 [n * X]``."""
    pairs = expert_of_pair.shape[0]
    order = jnp.argsort(expert_of_pair, stable=True).astype(jnp.int32)
    counts = _counts(expert_of_pair, num_experts + 1)
    first_pair = jnp.cumsum(counts) - counts
    ranks = jnp.arange(pairs, dtype=jnp.int32) - first_pair[expert_of_pair[order]]
    return jnp.zeros(pairs, jnp.int32).at[order].set(ranks)


def _counts(expert_of_pair: jax.Array, num_experts: int) -> jax.Array:
    return jnp.zeros(num_experts, jnp.int32).at[expert_of_pair].add(1, mode="drop")
