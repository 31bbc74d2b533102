"""Block sizes of the attention kernels: what was measured on a card, and a rule for every other."""

from __future__ import annotations

import dataclasses

MAX_SPLITS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlashDecodeConfig:
    """How attention over the cache is cut up.

    Attributes:
        block_q: queries (tokens times heads) of a program, 16 or more.
        block_s: cached rows read at a time, 16 or more.
        splits: programs that share the rows of one token.
        num_warps: of a program.
        num_stages: blocks of rows in flight.
    """

    block_q: int = 32
    block_s: int = 32
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 2


def flash_decode_heuristic(
    num_queries: int, batch: int, capacity: int, width: int, itemsize: int, shared_memory: int, multiprocessors: int
) -> FlashDecodeConfig:
    """Shares of at least two blocks of rows, and no more programs than fill the card once.

    Args:
        num_queries: per row of the batch, tokens times heads.
        batch: rows.
        capacity: capacity of the cache.
        width: values of a cached row.
        itemsize: bytes of one of them.
        shared_memory: bytes of it that a program may have.
        multiprocessors: of the card.
    """
    block_q = 16 if num_queries <= 16 else 32
    queries_bytes = block_q * width * 2 + 4096
    # Two blocks of rows in flight while a third is computed with, if there is room for them.
    # Rows of 8 bits go through registers on their way, which are full with blocks of 32.
    block_s, num_stages = 16, 2
    for rows, stages in ((32, 3), (16, 3)) if itemsize > 1 else ():
        if queries_bytes + stages * rows * width * itemsize <= shared_memory:
            block_s, num_stages = rows, stages
            break
    programs = batch * -(-num_queries // block_q)
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * programs <= multiprocessors and capacity // (2 * splits) >= 2 * block_s:
        splits *= 2
    return FlashDecodeConfig(block_q=block_q, block_s=block_s, splits=splits, num_stages=num_stages)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig:
    """How the projections before and after attention are cut up.

    Attributes:
        block_m: tokens of a program, 16 or more.
        per: tiles of 64 latents for which a program absorbs its query.
        num_warps: of a program.
        num_stages: chunks in flight.
    """

    block_m: int = 16
    per: int = 2
    num_warps: int = 4
    num_stages: int = 3


def projection_heuristic(tokens: int, latent_tiles: int, heads: int, multiprocessors: int) -> ProjectionConfig:
    """Four programs for each head: there are few, each with a long way, so they have wide chunks.

    Args:
        tokens: rows.
        latent_tiles: tiles of 64 latents.
        heads: on this device; for few of them more programs each.
        multiprocessors: of the card.
    """
    per = max(1, latent_tiles // 4)
    while latent_tiles % per or (per > 1 and heads * latent_tiles // per < multiprocessors // 2):
        per -= 1
    return ProjectionConfig(block_m=16 if tokens <= 16 else 32, per=per, num_stages=4)
