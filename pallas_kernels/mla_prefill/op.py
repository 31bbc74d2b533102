"""Attention of prompts: block sizes, the launch, and the merge of results over several ranges of keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _device, tuned
from pallas_kernels._implementation import Implementation, select_implementation
from pallas_kernels._kernel_args import compute_dtype, compute_itemsize
from pallas_kernels._launch import CompileOptions, KernelModule, launch
from pallas_kernels.mla_prefill.config import FlashAttentionConfig, HeadLayout, flash_attention_heuristic, padded_width
from pallas_kernels.mla_prefill.reference import EMPTY_LSE as EMPTY_LSE
from pallas_kernels.mla_prefill.reference import flash_attention_ref

kernels = KernelModule("pallas_kernels.mla_prefill.triton")


def flash_attention(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    first_key: jax.Array,
    *,
    scale: float,
    dtype: DTypeLike | None = None,
    config: FlashAttentionConfig | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes ``softmax(scale * q @ [k_nope | k_rope].T) @ v`` over the keys up to each query's own position.

    Args:
        q: ``[B, T, N, Hn + P]``, bfloat16 or float32 like keys and values.
        k_nope: ``[B, S, N, Hn]``, the part of the keys that each head has of its own.
        k_rope: ``[B, S, P]``, the part that all heads share.
        v: ``[B, S, N, Hv]``.
        positions: ``int32 [B, T]``, in any order; a query sees the keys whose slots are at or before its position.
        first_key: ``int32 [1]``, slot of the first key; the others follow.
        scale: Softmax scale applied to the attention scores, above zero.
        dtype: Dtype of the result; that of ``q`` by default.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        ``[B, T, N, Hv]``, and the log-sum-exp of the scores ``float32 [B, T, N]``. A query that sees no key has zeros,
        and :data:`EMPTY_LSE`.

    Raises:
        ValueError: If the shapes do not match, or one batch element has 2^31 values or more.
        NotImplementedError: If the named implementation cannot run.
    """
    _check_shapes(q, k_nope, k_rope, v, positions, first_key)
    if select_implementation(implementation) == "reference":
        return flash_attention_ref(q, k_nope, k_rope, v, positions, first_key, scale=scale, dtype=dtype)
    batch, tokens, heads, width = q.shape
    keys, value = k_nope.shape[1], v.shape[-1]
    key = flash_attention_tuning_key(tokens, batch * heads, (width, value), compute_itemsize(q.dtype))
    config = config or tuned.lookup_config(key)
    results = launch(
        kernels.flash_attention_kernel,
        {"q": q, "k_nope": k_nope, "k_rope": k_rope, "v": v, "positions": positions, "first_key": first_key},
        {
            "out": jax.ShapeDtypeStruct((batch, tokens, heads, value), dtype or q.dtype),
            "lse": jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
        },
        {
            "BATCH": batch,
            "TOKENS": tokens,
            "KEYS": keys,
            "DIMS": HeadLayout.create(heads, k_nope.shape[-1], k_rope.shape[-1], value),
            "HEADS_PER_WAVE": config.heads_per_wave,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SCALE": scale,
            "EMPTY_LSE": EMPTY_LSE,
            "DTYPE": compute_dtype(q.dtype),
        },
        grid=(math.ceil(tokens / config.block_m) * batch * heads,),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
    )
    return results["out"], results["lse"]


def _check_shapes(
    q: jax.Array, k_nope: jax.Array, k_rope: jax.Array, v: jax.Array, positions: jax.Array, first_key: jax.Array
) -> None:
    batch, tokens, heads, _ = q.shape
    keys, width, value = k_nope.shape[1], k_nope.shape[-1] + k_rope.shape[-1], v.shape[-1]
    expected = {
        "q": (q, (batch, tokens, heads, width)),
        "k_nope": (k_nope, (batch, keys, heads, k_nope.shape[-1])),
        "k_rope": (k_rope, (batch, keys, k_rope.shape[-1])),
        "v": (v, (batch, keys, heads, value)),
        "positions": (positions, (batch, tokens)),
        "first_key": (first_key, (1,)),
    }
    if wrong := {name: x.shape for name, (x, shape) in expected.items() if x.shape != shape}:
        raise ValueError(f"shapes that do not belong together: q {q.shape}, v {v.shape}, {wrong}")
    if max(tokens, keys) * heads * max(width, value) >= 1 << 31:
        raise ValueError(f"{tokens} queries and {keys} keys of {heads} heads are too many for one launch")


def flash_attention_tuning_key(
    num_queries: int, heads: int, widths: tuple[int, int], itemsize: int
) -> tuned.TuningKey[FlashAttentionConfig]:
    """Returns the sizes that the block sizes of :func:`flash_attention` depend on.

    Args:
        num_queries: Queries of a batch element.
        heads: Heads of all batch elements.
        widths: Widths of keys and of values.
        itemsize: Bytes of a factor of the products.
    """
    target = _device.current_target()
    card = (target.capability, target.shared_memory, target.multiprocessors) if target else (89, 101_376, 128)
    padded = padded_width(widths[0]), 2 * padded_width(-(-widths[1] // 2))
    heuristic = flash_attention_heuristic(num_queries, heads, padded, itemsize, *card)
    space = {"block_n": (16, 32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    key = f"{tuned.rows_bucket(num_queries)} h{heads} k{widths[0]} v{widths[1]} b{8 * itemsize}"
    return tuned.TuningKey("flash", key, heuristic, space)


def merge_attn_states(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Merges two results of :func:`flash_attention` over different keys into the float32 result over all of them."""
    (a, a_lse), (b, b_lse) = first, second
    max_lse = jnp.maximum(a_lse, b_lse)
    a_sum, b_sum = jnp.exp(a_lse - max_lse), jnp.exp(b_lse - max_lse)
    total = a_sum + b_sum
    a_weight, b_weight = (a_sum / total)[..., None], (b_sum / total)[..., None]
    return a.astype(jnp.float32) * a_weight + b.astype(jnp.float32) * b_weight, max_lse + jnp.log(total)
