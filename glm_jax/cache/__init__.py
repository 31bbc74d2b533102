"""The latent KV cache of multi-head latent attention (MLA)."""

from glm_jax.cache.latent import LatentCache as LatentCache
