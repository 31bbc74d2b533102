"""Reductions whose result for a row does not depend on the batch, the sharding or the compiler's choices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_INFINITY_RANK = 0x7F800000
_FAN_IN = 32


def token_ids_like(like: jax.Array) -> jax.Array:
    """Token id of each entry of a ``[B, V]`` array, as ``int32 [B, V]``."""
    return lax.broadcasted_iota(jnp.int32, like.shape, 1)


def all_gather_vocab(values: jax.Array) -> jax.Array:
    """Gathers ``[B, V]`` values split over the vocabulary, so that every row is complete on its devices.

    One all-gather replaces 32 reductions over devices for each threshold.
    """
    rows, columns = jax.typeof(values).sharding.spec
    return values if columns is None else jax.reshard(values, jax.P(rows, None))


def deterministic_sum(values: jax.Array) -> jax.Array:
    """Sums ``float32 [B, V]`` over the vocabulary to ``float32 [B]``, in an order that depends on ``V`` only.

    The compiler orders the additions of a plain sum by the batch size, and a token at the edge of top_p would be kept
    or dropped depending on the other rows. This sum is an explicit tree of additions, ``_FAN_IN`` wide. Its relative
    error is below 2e-6, and it never decreases when an entry grows.
    """
    while (width := values.shape[-1]) > 1:
        fan_in = min(_FAN_IN, width)
        chunk = -(-width // fan_in)
        values = jnp.pad(values, ((0, 0), (0, chunk * fan_in - width)))
        values = _pairwise_sum([values[:, i * chunk : (i + 1) * chunk] for i in range(fan_in)])
    return values[:, 0]


def _pairwise_sum(terms: list[jax.Array]) -> jax.Array:
    while len(terms) > 1:
        unpaired = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + unpaired
    return terms[0]


def search_threshold(is_enough: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The smallest float32 per row, from -inf to +inf, for which ``is_enough`` is true; exact, and without a sort.

    32 bisection steps over the bit patterns, in the order of the floats that they represent, reach a single float.

    Args:
        is_enough: Maps thresholds ``float32 [B]`` to ``bool [B]``; monotonic, and true for +inf.
        like: ``float32 [B]``, used for its shape and sharding only.

    Returns:
        Thresholds ``float32 [B]``.
    """

    def bisect(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        enough = is_enough(_float_at(middle))
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    zero = jnp.zeros_like(like, dtype=jnp.int32)
    _, high = lax.fori_loop(0, 32, bisect, (zero - _INFINITY_RANK - 1, zero + _INFINITY_RANK))
    return _float_at(high)


def _float_at(rank: jax.Array) -> jax.Array:
    """The float32 with a rank. Ranks are int32 in the order of the floats; +0.0 has rank 0."""
    return lax.bitcast_convert_type(rank ^ ((rank >> 31) & 0x7FFFFFFF), jnp.float32)


def masked_argmax(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest masked-in value of each row and the lowest index that has it.

    Two plain reductions take less time than an argmax.

    Args:
        values: ``float32 [B, V]``.
        mask: ``bool [B, V]``, entries to consider.

    Returns:
        Maxima ``float32 [B]`` and indices ``int32 [B]``; -inf and V for a row without any entry to consider.
    """
    best = jnp.where(mask, values, -jnp.inf).max(-1)
    is_best = mask & (values == best[:, None])
    return best, jnp.where(is_best, token_ids_like(values), values.shape[-1]).min(-1)
