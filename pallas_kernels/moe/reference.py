"""What the kernels of :mod:`pallas_kernels.moe` must compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.moe.op import Routed
from pallas_kernels.quant_matmul.op import Made, Squares
from pallas_kernels.quant_matmul.reference import factor_ref
from pallas_kernels.tiles import Tiles, from_tiles

_EXACT = jax.lax.Precision.HIGHEST


def choose_ref(routed: Routed, logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers and weights ``[M, X]`` of the experts of each token."""
    scores = jax.nn.sigmoid(logits)
    _, numbers = jax.lax.top_k(scores + bias[None], routed.chosen)
    weights = jnp.take_along_axis(scores, numbers, axis=-1)
    if routed.normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return numbers, weights * routed.factor


def gate_up_ref(
    routed: Routed,
    x: jax.Array,
    squares: Squares,
    place: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    gate: Tiles,
    up: Tiles,
    shared: tuple[Tiles, Tiles] | None,
    *,
    eps: float,
) -> jax.Array:
    """See :func:`pallas_kernels.moe.gate_up`."""
    layer = place[0]
    numbers, _ = choose_ref(routed, logits, bias[layer])
    rows = x.astype(jnp.float32) * factor_ref(squares, x.shape[1], eps)
    one, two = (jnp.einsum("mk,mxfk->mxf", rows, _values(w, layer)[numbers], precision=_EXACT) for w in (gate, up))
    made = [(jax.nn.silu(one) * two).reshape(-1)]
    if shared:
        one, two = (jnp.matmul(rows, _values(w, layer).T, precision=_EXACT) for w in shared)
        made.append((jax.nn.silu(one) * two).reshape(-1))
    return jnp.concatenate(made).astype(x.dtype)


def down_ref(
    routed: Routed,
    h: jax.Array,
    place: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    weight: Tiles,
    shared: Tiles | None,
    residual: jax.Array,
    next_norm: jax.Array,
    *,
    next_from: int = 0,
) -> Made:
    """See :func:`pallas_kernels.moe.down`."""
    layer, m = place[0], residual.shape[0]
    numbers, weights = choose_ref(routed, logits, bias[layer])
    pairs, rest = jnp.split(h.astype(jnp.float32), [m * routed.chosen * weight.inputs])
    pairs = pairs.reshape(m, routed.chosen, weight.inputs)
    outs = jnp.einsum("mxf,mxdf->mxd", pairs, _values(weight, layer)[numbers], precision=_EXACT)
    out = residual + jnp.sum(outs * weights[..., None], axis=1)
    if shared:
        out = out + jnp.matmul(rest.reshape(m, -1), _values(shared, layer).T, precision=_EXACT)
    scaled = (out * next_norm[place[0] + next_from][None].astype(jnp.float32)).astype(h.dtype)
    return Made(out, scaled, Squares(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1))


def _values(weight: Tiles, layer: jax.Array) -> jax.Array:
    return from_tiles(jax.tree.map(lambda array: array[layer], weight))
