"""Integers of 2 to 8 bits packed into 32-bit words, as a stream of bits that does not care where a word ends.

Value i has the bits ``i·b`` to ``i·b + b − 1`` of a row of little-endian words. For 2, 4 and 8 bits that is "so many
to a word, the first in the lowest bits"; of 3, 5, 6 and 7 bits, some values lie in two words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glm_jax.weights import unpack_nibbles

Array = np.ndarray[Any, np.dtype[Any]]

VALUES_PER_BLOCK = 8  # values after which the pattern of bytes and offsets repeats: 8 b bits are b bytes
# AWQ interleaves runs of eight: column c lies in place AWQ_PLACES[c].
AWQ_REVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def packed_word_count(values: int, bits: int) -> int:
    """Words that so many values need."""
    return -(-values * bits // 32)


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """Values 0 .. 2^bits − 1, uint8 ``[..., count]``, of 32-bit words ``[..., W]``."""
    packed = np.ascontiguousarray(packed).view(np.uint32)
    if bits == 8:
        return packed.view(np.uint8)[..., :count]
    if bits == 4:
        return unpack_nibbles(packed.view(np.uint8))[..., :count]
    octets, blocks = packed.view(np.uint8), -(-count // VALUES_PER_BLOCK)
    missing = blocks * bits - octets.shape[-1]
    if missing > 0:
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], missing), np.uint8)], -1)
    # Byte k of every block together, so that the loop runs over long rows.
    columns = np.ascontiguousarray(octets[..., : blocks * bits].reshape(-1, bits).T)
    values, mask = np.empty((VALUES_PER_BLOCK, columns.shape[1]), np.uint8), np.uint8((1 << bits) - 1)
    for i in range(VALUES_PER_BLOCK):
        octet, offset = divmod(i * bits, 8)
        value = columns[octet] >> np.uint8(offset)
        if offset + bits > 8:
            value |= columns[octet + 1] << np.uint8(8 - offset)
        values[i] = value & mask
    return values.T.reshape(*octets.shape[:-1], blocks * VALUES_PER_BLOCK)[..., :count]


def repack_awq_nibbles(packed: Array) -> Array:
    """4-bit codes of AWQ's words ``[I, O/8]`` as ``[O, I/2]``, two to a byte, the even input in the low half."""
    turned = np.ascontiguousarray(packed.T).view(np.uint32)
    even, odd = (np.ascontiguousarray(turned[:, start::2]) for start in (0, 1))
    codes = np.empty((len(turned), len(AWQ_REVERSE_ORDER), even.shape[1]), np.uint8)
    for column, place in enumerate(AWQ_REVERSE_ORDER):
        shift, mask = np.uint32(4 * place), np.uint32(15)
        codes[:, column] = ((even >> shift) & mask) | (((odd >> shift) & mask) << np.uint32(4))
    return codes.reshape(-1, even.shape[1])


def reorder_awq_columns(values: Array) -> Array:
    """Values unpacked from AWQ's words ``[..., n]``, n a multiple of 8, in the order of the columns."""
    runs = values.reshape(*values.shape[:-1], -1, len(AWQ_REVERSE_ORDER))
    return runs[..., AWQ_REVERSE_ORDER].reshape(values.shape)
