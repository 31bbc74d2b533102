"""Unpacks integers of 2 to 8 bits from 32-bit words, including AWQ's interleaved nibbles.

Each row of little-endian words is one continuous stream of bits: value i has the bits ``i·b`` to ``i·b + b − 1``.
Values of 2, 4 and 8 bits never cross a word boundary, and the first value of a word has its lowest bits. Some values of
3, 5, 6 and 7 bits are split between two words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glm_jax.weights import unpack_nibbles

Array = np.ndarray[Any, np.dtype[Any]]

VALUES_PER_BLOCK = 8  # eight values of b bits fill exactly b bytes, so byte offsets repeat from block to block
# AWQ interleaves each eight columns of a word: column c is the value number AWQ_REVERSE_ORDER[c], from the lowest bits.
AWQ_REVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def packed_word_count(values: int, bits: int) -> int:
    """Number of 32-bit words that hold so many values of so many bits."""
    return -(-values * bits // 32)


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """Unpacks 32-bit words ``[..., W]`` into uint8 ``[..., count]`` with values 0 .. 2^bits − 1."""
    packed = np.ascontiguousarray(packed).view(np.uint32)
    if bits == 8:
        return packed.view(np.uint8)[..., :count]
    if bits == 4:
        return unpack_nibbles(packed.view(np.uint8))[..., :count]
    octets, blocks = packed.view(np.uint8), -(-count // VALUES_PER_BLOCK)
    missing = blocks * bits - octets.shape[-1]
    if missing > 0:
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], missing), np.uint8)], -1)
    # Transposed, byte k of all blocks is one contiguous row, so that each NumPy operation below is long.
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
    """Repacks 4-bit values from AWQ's words along the outputs to bytes along the inputs.

    Args:
        packed: AWQ's ``qweight``, ``int32 [I, O/8]``.

    Returns:
        Values packed in pairs, ``uint8 [O, I/2]``, the even input in the low half of a byte.
    """
    words = np.ascontiguousarray(packed.T).view(np.uint32)
    even, odd = (np.ascontiguousarray(words[:, start::2]) for start in (0, 1))
    codes = np.empty((len(words), len(AWQ_REVERSE_ORDER), even.shape[1]), np.uint8)
    for column, position in enumerate(AWQ_REVERSE_ORDER):
        shift, mask = np.uint32(4 * position), np.uint32(15)
        codes[:, column] = ((even >> shift) & mask) | (((odd >> shift) & mask) << np.uint32(4))
    return codes.reshape(-1, even.shape[1])


def reorder_awq_columns(values: Array) -> Array:
    """Puts values ``[..., n]`` unpacked from AWQ's words into the order of the columns; n is a multiple of 8."""
    blocks = values.reshape(*values.shape[:-1], -1, len(AWQ_REVERSE_ORDER))
    return blocks[..., AWQ_REVERSE_ORDER].reshape(values.shape)
