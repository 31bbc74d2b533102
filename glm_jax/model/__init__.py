"""The network: ``GLM``, its transformer block and prediction layer, named activations, and the fused decode step."""

from glm_jax.model.glm import GLM as GLM
from glm_jax.model.hooks import activation_names as activation_names
