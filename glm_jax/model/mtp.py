"""The multi-token-prediction layer, used as a drafter (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2).

In GLM-4.7-Flash it is layer 47 of the checkpoint.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache
from glm_jax.model.block import ForwardContext, transformer_block
from glm_jax.ops.linear import embed_tokens, linear
from glm_jax.ops.norm import rms_norm
from glm_jax.weights import Weight
from glm_jax.weights.params import ParamTree


@jax.named_scope("mtp")
def draft_hidden_states(
    ctx: ForwardContext,
    hidden: jax.Array,
    next_tokens: jax.Array,
    cache: LatentCache | None,
    w: ParamTree,
    table: Weight,
) -> tuple[jax.Array, LatentCache | None]:
    """Hidden states that predict the tokens after ``next_tokens``.

    Entry ``p`` combines the model's hidden state at position ``p`` with token ``p + 1`` and predicts token ``p + 2``::

        z = eh_proj @ concat(norm_e(E[token]), norm_h(hidden))      # the embedding comes first
        out = norm(block(z))

    Args:
        ctx: Config, rules and positions of this call.
        hidden: ``[B, T, D]``, the model's state **after** its final norm.
        next_tokens: ``int32 [B, T]``.
        cache: Cache of this layer alone.
        w: The ``mtp`` parameters.
        table: This device's rows of the embedding.

    Returns:
        ``[B, T, D]`` after ``shared_head.norm`` (the input of a further draft step), and the cache.
    """
    eps, rules = ctx.cfg.rms_norm_eps, ctx.rules
    first_row = rules.index("vocab") * table.shape[0]
    embedded = rules.psum(embed_tokens(table, next_tokens, first_row), "vocab")
    embedding_and_state = jnp.concatenate(
        [rms_norm(embedded, w["enorm"], eps), rms_norm(hidden, w["hnorm"], eps)], axis=-1
    )
    z, cache = transformer_block(
        ctx, linear(embedding_and_state, w["eh_proj"]), cache, {"attn": w["attn"], "moe": w["moe"]}, 0, 0, "mtp"
    )
    return rms_norm(z, w["norm"], eps), cache
