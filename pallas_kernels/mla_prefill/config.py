"""Block sizes of the attention of prompts.

What the assembler of Triton 3.6 makes of the loop over keys that needs no mask, at widths of 256 and 256, bfloat16
throughout, with 8 warps. Counts are static and per warp; nothing has been timed.

====== ======= ==== ====== ============= ========= ============ ======== ======================
card   queries keys stages shared memory registers instructions products which are
====== ======= ==== ====== ============= ========= ============ ======== ======================
sm_89  128     16   3      98,304 bytes  201       359          64       HMMA 16 by 8
sm_120 128     16   3      98,304 bytes  198       366          64       HMMA 16 by 8
sm_90  128     64   2      196,608 bytes 240       486          24       HGMMA 64 by 64, 128
sm_100 128     64   2      197,168 bytes 210       547          24       UTCHMMA 128 by 64, 128
====== ======= ==== ====== ============= ========= ============ ======== ======================

* Of the float instructions (166, 166, 238, 213), 128 rescale the sums of values, which is why many keys at a time are
  better than few: on sm_90, 32 keys take 373 instructions.
* Where warps feed the tensor cores from registers (sm_89, sm_120), a warp must have 16 queries of its own. With 64
  queries and 32 keys, which is as much work, the compiler lays the warps along the keys: 96 products each, 543
  instructions and 9 barriers instead of 2, because some products are computed twice and the largest score of a query is
  then found across warps. With 128 queries and 32 keys, registers spill (84 bytes), and only one buffer has room. Three
  stages are two buffers here: while one block of keys is computed with, the next one is on its way.
* Where they read shared memory (sm_90, sm_100), two stages are two buffers. On sm_90 copies of the next keys begin
  behind the second product, and are waited for before the next first one; with three stages, for which there is room
  only at 32 keys, one turn later.
* The sums of values are two halves. In one piece they take all 255 registers on sm_90 and sm_100, and on sm_89 they
  bring about the layout along the keys: 160 products, 990 instructions, and spills.
"""

from __future__ import annotations

import dataclasses

# Shared memory beside the tiles: barriers, and what a reduction over all warps needs.
_RESERVED_SHARED_MEMORY = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttentionConfig:
    """How attention of many queries is cut up.

    Attributes:
        block_m: queries of a program, 16 for each warp.
        block_n: keys at a time, 16 or more.
        together: heads whose programs are neighbors; see :func:`heads_per_wave`.
        num_warps: of a program.
        num_stages: blocks of keys in flight.
    """

    block_m: int = 128
    block_n: int = 16
    together: int = 1
    num_warps: int = 8
    num_stages: int = 3


def flash_attention_heuristic(
    num_queries: int,
    heads: int,
    widths: tuple[int, int],
    itemsize: int,
    capability: int,
    shared_memory: int,
    multiprocessors: int,
) -> FlashAttentionConfig:
    """The largest blocks for which there is shared memory, and registers.

    Args:
        num_queries: per row of the batch.
        heads: of all rows of the batch.
        widths: of the tiles of keys and of values.
        itemsize: bytes of what the products take.
        capability: of the card, as in 89 for 8.9.
        shared_memory: bytes of it that a program may have.
        multiprocessors: of the card.
    """
    width, value = widths
    from_shared_memory = 90 <= capability < 120
    # In registers, a warp's part of the keys must find room beside its sums of values.
    most = 64 if from_shared_memory else max(16, min(64, 16 * 256 // value))

    def fits(block_m: int, block_n: int) -> bool:
        return (block_m * width + 2 * block_n * (width + value)) * itemsize + _RESERVED_SHARED_MEMORY <= shared_memory

    sizes = [(m, n) for m in (128, 64, 32, 16) for n in (64, 32, 16) if n <= most]
    block_m, block_n = next((size for size in sizes if fits(*size)), (16, 16))
    return FlashAttentionConfig(
        block_m=block_m,
        block_n=block_n,
        together=heads_per_wave(-(-num_queries // block_m), heads, multiprocessors),
        num_warps=block_m // 16,
        num_stages=2 if from_shared_memory else 3,
    )


def heads_per_wave(blocks: int, heads: int, multiprocessors: int) -> int:
    """Heads whose programs fill the card once: no more of their keys than need be are in the L2 cache at a time.

    Args:
        blocks: of queries, and so programs, for each head.
        heads: of all rows of the batch.
        multiprocessors: of the card.
    """
    return min(heads, -(-multiprocessors // blocks))
