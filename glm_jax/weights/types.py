"""Every way in which a weight is held."""

import jax

from glm_jax.weights.bf16_bits import Bfloat16Bits
from glm_jax.weights.quantized_tensor import QuantizedTensor
from glm_jax.weights.tiled_weight import TiledWeight

Weight = jax.Array | Bfloat16Bits | QuantizedTensor | TiledWeight
