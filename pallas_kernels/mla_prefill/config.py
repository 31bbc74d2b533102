"""Block sizes of the attention of prompts.

Triton 3.6's assembler gives these figures for the unmasked loop over keys, with keys and values of width 256, bfloat16
throughout, and 8 warps. Counts are static and per warp; nothing has been timed.

====== ======= ==== ====== ============= ========= ============ ======== ======================
GPU    queries keys stages shared memory registers instructions products product instructions
====== ======= ==== ====== ============= ========= ============ ======== ======================
sm_89  128     16   3      98,304 bytes  201       359          64       HMMA 16 by 8
sm_120 128     16   3      98,304 bytes  198       366          64       HMMA 16 by 8
sm_90  128     64   2      196,608 bytes 240       486          24       HGMMA 64 by 64, 128
sm_100 128     64   2      197,168 bytes 210       547          24       UTCHMMA 128 by 64, 128
====== ======= ==== ====== ============= ========= ============ ======== ======================

* Of the float instructions (166, 166, 238, 213), 128 rescale the sums of values, so large blocks of keys are better
  than small ones: on sm_90, 32 keys take 373 instructions.
* Where the tensor cores read operands from registers (sm_89, sm_120), each warp needs 16 queries of its own. With 64
  queries and 32 keys, which is as much work, the compiler distributes the warps along the keys: 96 products each, 543
  instructions and 9 barriers instead of 2, because some products are computed twice and the row maximum is reduced
  across warps. With 128 queries and 32 keys, registers spill (84 bytes), and shared memory holds only one buffer. Three
  stages are two buffers here: the next block of keys is loaded while one is used.
* Where the tensor cores read shared memory (sm_90, sm_100), two stages are two buffers. On sm_90 the copies of the next
  keys start after the second product and are awaited before the next first one; with three stages, which fit only with
  32 keys, one iteration later.
* The sums of values are two halves. In one piece they take all 255 registers on sm_90 and sm_100, and on sm_89 they
  cause the distribution along the keys: 160 products, 990 instructions, and spills.
"""

from __future__ import annotations

import dataclasses

# Shared memory besides the tiles: barriers, and reductions over all warps.
_RESERVED_SHARED_MEMORY = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttentionConfig:
    """Block sizes of attention of many queries.

    Attributes:
        block_m: Queries of a program, 16 for each warp.
        block_n: Keys of a step, 16 or more.
        heads_per_wave: Heads whose programs run at the same time; see :func:`heads_per_wave`.
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline that loads keys.
    """

    block_m: int = 128
    block_n: int = 16
    heads_per_wave: int = dataclasses.field(default=1, metadata={"json": "together"})
    num_warps: int = 8
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """Widths of expanded heads, as one constexpr of a kernel.

    Attributes:
        heads: Attention heads of a batch element.
        nope: Width of a head's own part of a key.
        rope: Width of the part that all heads share.
        value_dim: Width of a head's value.
        key_tile: Columns of a tile of keys, a power of two.
        value_tile: Columns of a tile of values, a power of two; two tiles hold a value.
    """

    heads: int
    nope: int
    rope: int
    value_dim: int
    key_tile: int
    value_tile: int

    @classmethod
    def create(cls, heads: int, nope: int, rope: int, value_dim: int) -> HeadLayout:
        """Returns the layout of heads of these widths."""
        return cls(
            heads=heads,
            nope=nope,
            rope=rope,
            value_dim=value_dim,
            key_tile=padded_width(nope + rope),
            value_tile=padded_width(-(-value_dim // 2)),
        )


def padded_width(width: int) -> int:
    """Returns the columns of a tile that holds ``width`` columns: a power of two, 16 or more."""
    return max(16, 1 << (width - 1).bit_length())


def flash_attention_heuristic(
    num_queries: int,
    heads: int,
    widths: tuple[int, int],
    itemsize: int,
    capability: int,
    shared_memory: int,
    multiprocessors: int,
) -> FlashAttentionConfig:
    """Returns the largest blocks that fit shared memory and registers.

    Args:
        num_queries: Queries of a batch element.
        heads: Heads of all batch elements.
        widths: Widths of the tiles of keys and of values.
        itemsize: Bytes of a factor of the products.
        capability: Ten times the compute capability: 89 for 8.9.
        shared_memory: Bytes of shared memory that a program may request.
        multiprocessors: Multiprocessors of the GPU.
    """
    width, value = widths
    reads_shared_memory = 90 <= capability < 120
    # In registers, a warp's share of the keys must fit beside its sums of values.
    max_keys = 64 if reads_shared_memory else max(16, min(64, 16 * 256 // value))

    def fits(block_m: int, block_n: int) -> bool:
        return (block_m * width + 2 * block_n * (width + value)) * itemsize + _RESERVED_SHARED_MEMORY <= shared_memory

    sizes = [(m, n) for m in (128, 64, 32, 16) for n in (64, 32, 16) if n <= max_keys]
    block_m, block_n = next((size for size in sizes if fits(*size)), (16, 16))
    return FlashAttentionConfig(
        block_m=block_m,
        block_n=block_n,
        heads_per_wave=heads_per_wave(-(-num_queries // block_m), heads, multiprocessors),
        num_warps=block_m // 16,
        num_stages=2 if reads_shared_memory else 3,
    )


def heads_per_wave(blocks: int, heads: int, multiprocessors: int) -> int:
    """Returns the heads whose programs fill the GPU once, so that the L2 cache holds the keys of few heads at a time.

    Args:
        blocks: Blocks of queries, and so programs, of each head.
        heads: Heads of all batch elements.
        multiprocessors: Multiprocessors of the GPU.
    """
    return min(heads, -(-multiprocessors // blocks))
