"""What the kernels of :mod:`pallas_kernels.moe` must compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.moe.op import RouterConfig
from pallas_kernels.quant_matmul.op import LinearOutput, SumSq
from pallas_kernels.quant_matmul.reference import inv_rms_ref
from pallas_kernels.tiles import Tiles, dequantize_tiles

_EXACT = jax.lax.Precision.HIGHEST


def route_ref(router: RouterConfig, logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers and weights ``[M, X]`` of the experts of each token."""
    scores = jax.nn.sigmoid(logits)
    _, numbers = jax.lax.top_k(scores + bias[None], router.experts_per_token)
    weights = jnp.take_along_axis(scores, numbers, axis=-1)
    if router.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return numbers, weights * router.scaling_factor


def gate_up_ref(
    router: RouterConfig,
    x: jax.Array,
    sum_sq: SumSq,
    layer_index: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    gate: Tiles,
    up: Tiles,
    shared: tuple[Tiles, Tiles] | None,
    *,
    eps: float,
) -> jax.Array:
    """See :func:`pallas_kernels.moe.gate_up`."""
    layer = layer_index[0]
    numbers, _ = route_ref(router, logits, bias[layer])
    rows = x.astype(jnp.float32) * inv_rms_ref(sum_sq, x.shape[1], eps)
    one, two = (
        jnp.einsum("mk,mxfk->mxf", rows, _dequantize_layer(w, layer)[numbers], precision=_EXACT) for w in (gate, up)
    )
    made = [(jax.nn.silu(one) * two).reshape(-1)]
    if shared:
        one, two = (jnp.matmul(rows, _dequantize_layer(w, layer).T, precision=_EXACT) for w in shared)
        made.append((jax.nn.silu(one) * two).reshape(-1))
    return jnp.concatenate(made).astype(x.dtype)


def down_ref(
    router: RouterConfig,
    h: jax.Array,
    layer_index: jax.Array,
    logits: jax.Array,
    bias: jax.Array,
    weight: Tiles,
    shared: Tiles | None,
    residual: jax.Array,
    next_norm: jax.Array,
    *,
    next_norm_offset: int = 0,
) -> LinearOutput:
    """See :func:`pallas_kernels.moe.down`."""
    layer, m = layer_index[0], residual.shape[0]
    numbers, weights = route_ref(router, logits, bias[layer])
    pairs, rest = jnp.split(h.astype(jnp.float32), [m * router.experts_per_token * weight.inputs])
    pairs = pairs.reshape(m, router.experts_per_token, weight.inputs)
    outs = jnp.einsum("mxf,mxdf->mxd", pairs, _dequantize_layer(weight, layer)[numbers], precision=_EXACT)
    out = residual + jnp.sum(outs * weights[..., None], axis=1)
    if shared:
        out = out + jnp.matmul(rest.reshape(m, -1), _dequantize_layer(shared, layer).T, precision=_EXACT)
    scaled = (out * next_norm[layer_index[0] + next_norm_offset][None].astype(jnp.float32)).astype(h.dtype)
    return LinearOutput(out, scaled, SumSq(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1))


def _dequantize_layer(weight: Tiles, layer: jax.Array) -> jax.Array:
    return dequantize_tiles(jax.tree.map(lambda array: array[layer], weight))
