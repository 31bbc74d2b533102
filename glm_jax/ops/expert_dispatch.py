"""Dispatch of (token, expert) pairs: sorted by expert into blocks of equal height."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BlockDispatch(NamedTuple):
    """Pairs sorted by expert into blocks of equal height, each of one expert.

    ``expert_ids [blocks]`` is the expert of a block or -1, ``pair_ids [blocks, height]`` the pairs in it or -1, and
    ``pair_slots [pairs]`` where each pair went.
    """

    expert_ids: jax.Array
    pair_ids: jax.Array
    pair_slots: jax.Array


def dispatch_to_blocks(expert_of_pair: jax.Array, num_experts: int, block_size: int | None = None) -> BlockDispatch:
    """Sorts pairs by expert into blocks.

    Args:
        expert_of_pair: int32 ``[n * X]``; pairs of an expert past the end are left out (their slot is 0).
        num_experts: number of experts.
        block_size: of a block; what suits a CPU unless given.
    """
    pairs = expert_of_pair.shape[0]
    block_size = block_size or min(64, max(8, 1 << (max(pairs // num_experts, 1) - 1).bit_length()))
    blocks = min(pairs, num_experts + pairs // block_size)
    blocks_of = -(-_counts(expert_of_pair, num_experts) // block_size)
    first_block = jnp.cumsum(blocks_of) - blocks_of
    here = expert_of_pair < num_experts
    slot = first_block[jnp.where(here, expert_of_pair, 0)] * block_size + rank_in_expert(expert_of_pair, num_experts)
    slot = jnp.where(here, slot, blocks * block_size)
    table = jnp.full(blocks * block_size, -1, jnp.int32).at[slot].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    table = table.reshape(blocks, block_size)
    first = table[:, 0]
    owners = jnp.where(first >= 0, expert_of_pair[jnp.maximum(first, 0)], -1)
    return BlockDispatch(owners, table, jnp.where(here, slot, 0))


def rank_in_expert(expert_of_pair: jax.Array, num_experts: int) -> jax.Array:
    """How many earlier pairs have the same expert, int32 ``[n * X]``."""
    pairs = expert_of_pair.shape[0]
    order = jnp.argsort(expert_of_pair, stable=True).astype(jnp.int32)
    counts = _counts(expert_of_pair, num_experts + 1)
    first_pair = jnp.cumsum(counts) - counts
    ranks = jnp.arange(pairs, dtype=jnp.int32) - first_pair[expert_of_pair[order]]
    return jnp.zeros(pairs, jnp.int32).at[order].set(ranks)


def _counts(expert_of_pair: jax.Array, experts: int) -> jax.Array:
    return jnp.zeros(experts, jnp.int32).at[expert_of_pair].add(1, mode="drop")
