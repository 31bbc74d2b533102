"""The multi-token-prediction layer, used as a drafter (DeepSeek-V3, section 2.2; layer 47 of GLM-4.7-Flash)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache
from glm_jax.model.block import ForwardContext, transformer_block
from glm_jax.ops.linear import embed_tokens, linear
from glm_jax.ops.norm import rms_norm


def draft_hidden_states(
    ctx: ForwardContext,
    hidden: jax.Array,
    next_tokens: jax.Array,
    cache: LatentCache | None,
    w: dict[str, Any],
    table: Any,
) -> tuple[jax.Array, LatentCache | None]:
    """State from which the token after ``next_tokens`` is predicted.

    Entry ``p`` joins the model's hidden state of position ``p`` with token ``p + 1`` and predicts token ``p + 2``::

        z = eh_proj @ concat(norm_e(E[token]), norm_h(hidden))      # the embedding comes first
        out = norm(block(z))

    Args:
        hidden: ``[B, T, D]``, the model's state **after** its final norm.
        next_tokens: int32 ``[B, T]``.
        cache: this layer's own, of one layer.
        w: the ``mtp`` parameters.
        table: embedding rows of this device.

    Returns:
        ``[B, T, D]`` after ``shared_head.norm`` (what a further draft step consumes), and the cache.
    """
    eps, rules = ctx.cfg.rms_norm_eps, ctx.rules
    first = rules.axis_index("vocab") * table.shape[0]
    embedded = rules.psum(embed_tokens(table, next_tokens, first), "vocab")
    joined = jnp.concatenate([rms_norm(embedded, w["enorm"], eps), rms_norm(hidden, w["hnorm"], eps)], axis=-1)
    z, cache = transformer_block(
        ctx, linear(joined, w["eh_proj"]), cache, {"attn": w["attn"], "moe": w["moe"]}, 0, 0, "mtp"
    )
    return rms_norm(z, w["norm"], eps), cache
