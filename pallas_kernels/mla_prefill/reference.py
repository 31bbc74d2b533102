"""Attention of prompts in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_EXACT = jax.lax.Precision.HIGHEST
# Log-sum-exp of no scores; finite, so that differences of two are numbers.
EMPTY_LSE = -1e30


def flash_attention_ref(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    first_key: jax.Array,
    *,
    scale: float,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reference of :func:`pallas_kernels.mla_prefill.flash_attention`."""
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    keys = jnp.concatenate([k_nope, shared], axis=-1).astype(jnp.float32)
    scores = jnp.einsum("btnh,bsnh->btns", q.astype(jnp.float32), keys, precision=_EXACT) * scale
    slots = first_key[0] + jnp.arange(keys.shape[1], dtype=jnp.int32)
    visible = (slots[None, None] <= positions[:, :, None])[:, :, None]
    row_max = jnp.max(jnp.where(visible, scores, EMPTY_LSE), axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - row_max[..., None]), 0.0)
    row_sum = jnp.sum(weights, axis=-1)
    divisor = jnp.where(row_sum == 0, 1.0, row_sum)
    out = jnp.einsum("btns,bsnv->btnv", weights / divisor[..., None], v.astype(jnp.float32), precision=_EXACT)
    return out.astype(dtype or q.dtype), jnp.where(row_sum == 0, EMPTY_LSE, row_max + jnp.log(divisor))
