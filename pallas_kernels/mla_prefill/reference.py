"""What the kernel of :mod:`pallas_kernels.mla_prefill` must compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_prefill.op import EMPTY_LSE

_EXACT = jax.lax.Precision.HIGHEST


def flash_attention_ref(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    first_key: jax.Array,
    *,
    scale: float,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See :func:`pallas_kernels.mla_prefill.flash_attention`."""
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    keys = jnp.concatenate([k_nope, shared], axis=-1).astype(jnp.float32)
    scores = jnp.einsum("btnh,bsnh->btns", q.astype(jnp.float32), keys, precision=_EXACT) * scale
    slots = first_key[0] + jnp.arange(keys.shape[1], dtype=jnp.int32)
    visible = (slots[None, None] <= positions[:, :, None])[:, :, None]
    top = jnp.max(jnp.where(visible, scores, EMPTY_LSE), axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0.0)
    total = jnp.sum(weights, axis=-1)
    some = jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("btns,bsnv->btnv", weights / some[..., None], v.astype(jnp.float32), precision=_EXACT)
    return out.astype(dtype or q.dtype), jnp.where(total == 0, EMPTY_LSE, top + jnp.log(some))
