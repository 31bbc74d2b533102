"""Root-mean-square norm."""

import jax
import jax.numpy as jnp


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis, in the order of transformers' ``Glm4MoeLiteRMSNorm``.

    The mean is taken in float32, and the result is cast back **before** the weight is applied: in bfloat16 the order
    changes the last bit.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    normed = (wide * scale).astype(x.dtype)
    return normed * jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
