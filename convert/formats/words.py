"""Integers of 2 to 8 bits packed into 32-bit words, as a stream of bits that does not care where a word ends.

Value i has the bits ``i·b`` to ``i·b + b − 1`` of a row of little-endian words. For 2, 4 and 8 bits that is "so many
to a word, the first in the lowest bits"; of 3, 5, 6 and 7 bits, some values lie in two words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 32  # values after which the pattern of words and offsets repeats: 32 b bits are b words
# AWQ interleaves runs of eight: column c lies in place AWQ_PLACES[c].
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def word_count(values: int, bits: int) -> int:
    """Words that so many values need."""
    return -(-values * bits // 32)


def unpack(words: Array, bits: int, count: int) -> Array:
    """Values 0 .. 2^bits − 1, uint8 ``[..., count]``, of 32-bit words ``[..., W]``."""
    words = np.ascontiguousarray(words).view(np.uint32)
    if bits == 8:
        return words.view(np.uint8)[..., :count]
    blocks = -(-count // BLOCK)
    missing = blocks * bits - words.shape[-1]
    if missing > 0:
        words = np.concatenate([words, np.zeros((*words.shape[:-1], missing), np.uint32)], -1)
    grouped = words[..., : blocks * bits].reshape(*words.shape[:-1], blocks, bits)
    values = np.empty((*grouped.shape[:-1], BLOCK), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for i in range(BLOCK):
        word, offset = divmod(i * bits, 32)
        value = grouped[..., word] >> np.uint32(offset)
        if offset + bits > 32:
            value = value | (grouped[..., word + 1] << np.uint32(32 - offset))
        values[..., i] = value & mask
    return values.reshape(*words.shape[:-1], blocks * BLOCK)[..., :count]


def awq_order(values: Array) -> Array:
    """Values unpacked from AWQ's words ``[..., n]``, n a multiple of 8, in the order of the columns."""
    runs = values.reshape(*values.shape[:-1], -1, len(AWQ_PLACES))
    return runs[..., AWQ_PLACES].reshape(values.shape)
