"""Every way in which a weight is held."""

import jax

from glm_jax.quant.bits import Bfloat16Bits
from glm_jax.quant.tensor import QuantizedTensor
from glm_jax.quant.tiled import TiledWeight

Weight = jax.Array | Bfloat16Bits | QuantizedTensor | TiledWeight
