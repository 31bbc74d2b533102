"""Noise that is a function of (seed, position, token id) and of nothing else.

A row's tokens therefore depend neither on its neighbors nor on the batch, its slot, the mesh or how many tokens one
step draws: verifying a drafted token redraws the very token that plain decoding would have drawn.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The Threefry-2x32-20 random function on uint32 arrays of shapes that broadcast.

    Written out because its value is a promise (the same tokens from the same seed under every version of JAX) that a
    fused kernel has to keep too.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 5.2 and its Random123 code.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def gumbel_noise(seeds: jax.Array, positions: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise, float32 ``[B, V]``, between -2.9 and 22.9.

    ``argmax(logits + noise)`` is a draw from ``softmax(logits)``. The winning tail is where the uniform is near 0: all
    32 bits are kept there, so that 154,880 equally likely tokens rarely tie.

    Args:
        seeds: uint32 ``[B, 2]``, the high and the low half.
        positions: int32 ``[B]``.
        ids: int32 ``[B, V]``.
    """
    key = (seeds[:, :1], seeds[:, 1:])
    counter = (positions.astype(jnp.uint32)[:, None], ids.astype(jnp.uint32))
    bits, _ = threefry2x32(key, counter)
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    # Rounding may reach 1, whose noise of -inf would lose even against no rival.
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24)))
