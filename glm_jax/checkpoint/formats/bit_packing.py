"""Integers of 2 to 8 bits packed into 32-bit words, as a stream of bits that does not care where a word ends.

Value i has the bits ``i·b`` to ``i·b + b − 1`` of a row of little-endian words. For 2, 4 and 8 bits that is "so many
to a word, the first in the lowest bits"; of 3, 5, 6 and 7 bits, some values lie in two words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glm_jax.weights import unpack_nibbles

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 8  # values after which the pattern of bytes and offsets repeats: 8 b bits are b bytes
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
    if bits == 4:
        return unpack_nibbles(words.view(np.uint8))[..., :count]
    octets, blocks = words.view(np.uint8), -(-count // BLOCK)
    missing = blocks * bits - octets.shape[-1]
    if missing > 0:
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], missing), np.uint8)], -1)
    # Byte k of every block together, so that the loop runs over long rows.
    columns = np.ascontiguousarray(octets[..., : blocks * bits].reshape(-1, bits).T)
    values, mask = np.empty((BLOCK, columns.shape[1]), np.uint8), np.uint8((1 << bits) - 1)
    for i in range(BLOCK):
        octet, offset = divmod(i * bits, 8)
        value = columns[octet] >> np.uint8(offset)
        if offset + bits > 8:
            value |= columns[octet + 1] << np.uint8(8 - offset)
        values[i] = value & mask
    return values.T.reshape(*octets.shape[:-1], blocks * BLOCK)[..., :count]


def awq_nibbles(words: Array) -> Array:
    """4-bit codes of AWQ's words ``[I, O/8]`` as ``[O, I/2]``, two to a byte, the even input in the low half."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    even, odd = (np.ascontiguousarray(turned[:, start::2]) for start in (0, 1))
    codes = np.empty((len(turned), len(AWQ_PLACES), even.shape[1]), np.uint8)
    for column, place in enumerate(AWQ_PLACES):
        shift, mask = np.uint32(4 * place), np.uint32(15)
        codes[:, column] = ((even >> shift) & mask) | (((odd >> shift) & mask) << np.uint32(4))
    return codes.reshape(-1, even.shape[1])


def awq_order(values: Array) -> Array:
    """Values unpacked from AWQ's words ``[..., n]``, n a multiple of 8, in the order of the columns."""
    runs = values.reshape(*values.shape[:-1], -1, len(AWQ_PLACES))
    return runs[..., AWQ_PLACES].reshape(values.shape)
