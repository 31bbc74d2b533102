"""Gumbel noise as a pure function of (seed, position, token id).

A request's tokens therefore do not depend on the other requests, the batch size, the slot, the mesh or the number of
tokens per step. Verifying a drafted token samples the same token that plain decoding would have sampled.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The counter-based random function Threefry-2x32-20 on ``uint32`` arrays whose shapes broadcast.

    It is implemented here, and again in the fused kernels, because the same seed must give the same tokens under every
    version of JAX.

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
    """Standard Gumbel noise ``float32 [B, V]``, between -2.9 and 22.9.

    ``argmax(logits + noise)`` is a sample from ``softmax(logits)`` (the Gumbel-max trick). Large noise comes from
    uniform numbers near 0, where all 32 random bits are kept, so that 154,880 equally likely tokens rarely tie.

    Args:
        seeds: ``uint32 [B, 2]``, the high and the low half of each seed.
        positions: ``int32 [B]``, position of the sampled token in its sequence.
        ids: ``int32 [B, V]``, token ids.
    """
    key = (seeds[:, :1], seeds[:, 1:])
    counter = (positions.astype(jnp.uint32)[:, None], ids.astype(jnp.uint32))
    bits, _ = threefry2x32(key, counter)
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    # Rounding may give 1, whose noise of -inf would exclude a token even if it is the only one left.
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24)))
