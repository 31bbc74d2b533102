"""The operation: which block sizes, the launch, and how results over several stretches of keys become one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import CompileOptions, launch
from pallas_kernels.mla_prefill.config import FlashAttentionConfig, flash_attention_heuristic
from pallas_kernels.quant_matmul.op import compute_dtype

# The logarithm of a sum of no exponentials, finite so that differences of two are numbers.
EMPTY_LSE = -1e30


def flash_attention(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    first_key: jax.Array,
    *,
    scale: float,
    dtype: Any = None,
    config: FlashAttentionConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``softmax(scale * q @ [nope | rope].T) @ v`` over the keys up to each query's own position.

    Args:
        q: ``[B, T, N, H + P]``, bfloat16 or float32, as are keys and values.
        k_nope: ``[B, S, N, H]``, the part of the keys that each head has for itself.
        k_rope: ``[B, S, P]``, the part that all heads share.
        v: ``[B, S, N, V]``.
        positions: int32 ``[B, T]``, any; a query sees the keys whose slots are not above its own.
        first_key: int32 ``[1]``, slot of the first key; the others follow.
        scale: of the scores, above zero.
        dtype: of the result; that of ``q`` unless given.
        config: block sizes; chosen for the card unless given.

    Returns:
        ``[B, T, N, V]``, and the logarithms of the sums of exponentials, float32 ``[B, T, N]``. A query that sees no
        key has zeros, and :data:`EMPTY_LSE`.

    Raises:
        ValueError: if the shapes do not belong together, or a row of the batch has 2^31 values or more.
        LaunchError: without a GPU to compile for.
    """
    batch, tokens, heads, _ = q.shape
    keys, width, value = k_nope.shape[1], k_nope.shape[-1] + k_rope.shape[-1], v.shape[-1]
    expected = {
        "q": (q, (batch, tokens, heads, width)),
        "nope": (k_nope, (batch, keys, heads, k_nope.shape[-1])),
        "rope": (k_rope, (batch, keys, k_rope.shape[-1])),
        "v": (v, (batch, keys, heads, value)),
        "positions": (positions, (batch, tokens)),
        "first_key": (first_key, (1,)),
    }
    if wrong := {name: x.shape for name, (x, right) in expected.items() if x.shape != right}:
        raise ValueError(f"shapes that do not belong together: q {q.shape}, v {v.shape}, {wrong}")
    if max(tokens, keys) * heads * max(width, value) >= 1 << 31:
        raise ValueError(f"{tokens} queries and {keys} keys of {heads} heads are too many for one launch")
    compute = compute_dtype(q.dtype)
    h, w = padded_width(width), padded_width(-(-value // 2))
    config = config or tuned.lookup_config(
        flash_attention_tuning_key(tokens, batch * heads, (width, value), compute.primitive_bitwidth // 8)
    )
    from pallas_kernels.mla_prefill.triton import flash_attention_kernel

    out, lse = launch(
        flash_attention_kernel,
        [q, k_nope, k_rope, v, positions, first_key],
        [
            jax.ShapeDtypeStruct((batch, tokens, heads, value), dtype or q.dtype),
            jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
        ],
        grid=(math.ceil(tokens / config.block_m) * batch * heads,),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        BATCH=batch,
        T=tokens,
        S=keys,
        HEADS=heads,
        NOPE=k_nope.shape[-1],
        ROPE=k_rope.shape[-1],
        V=value,
        TOGETHER=config.together,
        BM=config.block_m,
        BN=config.block_n,
        H=h,
        W=w,
        SCALE=scale,
        EMPTY=EMPTY_LSE,
        DT=compute,
    )
    return out, lse


def flash_attention_tuning_key(
    num_queries: int, heads: int, widths: tuple[int, int], itemsize: int
) -> tuned.TuningKey[FlashAttentionConfig]:
    """What block sizes of :func:`flash_attention` depend on.

    Args:
        num_queries: per row of the batch.
        heads: of all rows of the batch.
        widths: of keys and of values.
        itemsize: bytes of what the products take.
    """
    target = _device.current_target()
    card = (target.capability, target.shared_memory, target.multiprocessors) if target else (89, 101_376, 128)
    tiles = padded_width(widths[0]), 2 * padded_width(-(-widths[1] // 2))
    rule = flash_attention_heuristic(num_queries, heads, tiles, itemsize, *card)
    axes = {"block_n": (16, 32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    key = f"{tuned.rows_bucket(num_queries)} h{heads} k{widths[0]} v{widths[1]} b{8 * itemsize}"
    return tuned.TuningKey("flash", key, rule, axes)


def padded_width(width: int) -> int:
    """The width of a tile that holds so many columns."""
    return max(16, 1 << (width - 1).bit_length())


def merge_attn_states(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """What :func:`flash_attention` would give over the keys of two of its results together, in float32."""
    (a, a_lse), (b, b_lse) = one, other
    top = jnp.maximum(a_lse, b_lse)
    a_sum, b_sum = jnp.exp(a_lse - top), jnp.exp(b_lse - top)
    total = a_sum + b_sum
    a_share, b_share = (a_sum / total)[..., None], (b_sum / total)[..., None]
    return a.astype(jnp.float32) * a_share + b.astype(jnp.float32) * b_share, top + jnp.log(total)
