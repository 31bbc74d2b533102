"""Arithmetic whose result is a function of a row alone: not of the batch, its layout or the compiler's choices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_INFINITY_RANK = 0x7F800000
_FAN_IN = 32


def token_ids_like(like: jax.Array) -> jax.Array:
    """The token id of each entry, int32 ``[B, V]``."""
    return lax.broadcasted_iota(jnp.int32, like.shape, 1)


def all_gather_vocab(values: jax.Array) -> jax.Array:
    """``[B, V]`` values, every row whole on its devices: one all-gather, where each threshold takes 32 exchanges."""
    rows, columns = jax.typeof(values).sharding.spec
    return values if columns is None else jax.reshard(values, jax.P(rows, None))


def deterministic_sum(values: jax.Array) -> jax.Array:
    """Sums each row of float32 ``[B, V]`` to ``[B]``, in an order that depends on ``V`` only.

    A plain sum is added up as the compiler sees fit for the batch, and a token on the edge of top_p would come and go
    with its neighbors. This one is spelled out as a tree of additions, ``_FAN_IN`` wide; its relative error is below
    2e-6, and it never decreases when an entry grows.
    """
    while (width := values.shape[-1]) > 1:
        fan = min(_FAN_IN, width)
        chunk = -(-width // fan)
        values = jnp.pad(values, ((0, 0), (0, chunk * fan - width)))
        values = _pairwise_sum([values[:, i * chunk : (i + 1) * chunk] for i in range(fan)])
    return values[:, 0]


def _pairwise_sum(parts: list[jax.Array]) -> jax.Array:
    while len(parts) > 1:
        alone = parts[-1:] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + alone
    return parts[0]


def search_threshold(is_enough: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The smallest float32 per row, -inf and +inf included, that is enough: an exact threshold, found without a sort.

    32 halvings of the bit patterns between the infinities, in the order of the floats they stand for, find the very
    float.

    Args:
        is_enough: float32 ``[B]`` to bool ``[B]``, monotonic, and true of +inf.
        like: float32 ``[B]``, for its shape and layout.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found = is_enough(_float_at(middle))
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    zero = jnp.zeros_like(like, dtype=jnp.int32)
    _, high = lax.fori_loop(0, 32, halve, (zero - _INFINITY_RANK - 1, zero + _INFINITY_RANK))
    return _float_at(high)


def _float_at(rank: jax.Array) -> jax.Array:
    """The float32 of a rank: ranks are int32, ordered as the floats are, and 0 for +0.0."""
    return lax.bitcast_convert_type(rank ^ ((rank >> 31) & 0x7FFFFFFF), jnp.float32)


def masked_argmax(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest value of each row ``mask`` the marked entries, float32 ``[B]``, and the lowest index that has it.

    Without a marked entry: -inf and V. Two plain reductions take less time than an argmax.
    """
    best = jnp.where(mask, values, -jnp.inf).max(-1)
    holders = mask & (values == best[:, None])
    return best, jnp.where(holders, token_ids_like(values), values.shape[-1]).min(-1)
