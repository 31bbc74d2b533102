"""Block sizes of attention over the latent cache: the heuristics for cards without tuned sizes."""

from __future__ import annotations

import dataclasses

MAX_SPLITS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlashDecodeConfig:
    """Block sizes of attention over the cache.

    Attributes:
        block_q: Queries (tokens times heads) of a program, 16 or more.
        block_s: Cached rows of a step, 16 or more.
        splits: Programs that share the cached rows of one sequence.
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline that loads cached rows.
    """

    block_q: int = 32
    block_s: int = 32
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 2


def flash_decode_heuristic(
    num_queries: int, batch: int, capacity: int, width: int, itemsize: int, shared_memory: int, multiprocessors: int
) -> FlashDecodeConfig:
    """Returns splits of at least two blocks of rows each, and no more programs than fill the GPU once.

    Args:
        num_queries: Queries of a sequence, tokens times heads.
        batch: Sequences.
        capacity: Slots of a sequence in the cache.
        width: Values of a cached row.
        itemsize: Bytes of one of them.
        shared_memory: Bytes of shared memory that a program may request.
        multiprocessors: Multiprocessors of the GPU.
    """
    block_q = 16 if num_queries <= 16 else 32
    queries_bytes = block_q * width * 2 + 4096
    # Two blocks of rows are loaded while a third is used, if they fit. Rows of 8 bits pass through registers, which
    # blocks of 32 would fill.
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
    """Block sizes of the projections before and after attention.

    Attributes:
        block_m: Tokens of a program, 16 or more.
        tiles_per_program: Tiles of 64 latents that a program computes of its absorbed query.
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline that loads chunks.
    """

    block_m: int = 16
    tiles_per_program: int = dataclasses.field(default=2, metadata={"json": "per"})
    num_warps: int = 4
    num_stages: int = 3


def projection_heuristic(tokens: int, latent_tiles: int, heads: int, multiprocessors: int) -> ProjectionConfig:
    """Returns four programs for each head, or more for few heads. They are few and long, so their chunks are wide.

    Args:
        tokens: Rows of the activations.
        latent_tiles: Tiles of 64 latents.
        heads: Heads on this device.
        multiprocessors: Multiprocessors of the GPU.
    """
    tiles = max(1, latent_tiles // 4)
    while latent_tiles % tiles or (tiles > 1 and heads * latent_tiles // tiles < multiprocessors // 2):
        tiles -= 1
    return ProjectionConfig(block_m=16 if tokens <= 16 else 32, tiles_per_program=tiles, num_stages=4)
