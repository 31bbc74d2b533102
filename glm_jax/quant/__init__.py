"""How weights are stored where that differs from a plain array: integers and small floats with scales."""

from glm_jax.quant.bits import Bfloat16Bits as Bfloat16Bits
from glm_jax.quant.codes import pack_nibbles as pack_nibbles
from glm_jax.quant.codes import unpack_nibbles as unpack_nibbles
from glm_jax.quant.rounding import quantize as quantize
from glm_jax.quant.rules import PRESETS as PRESETS
from glm_jax.quant.rules import QuantRules as QuantRules
from glm_jax.quant.spec import QuantSpec as QuantSpec
from glm_jax.quant.tensor import QuantizedTensor as QuantizedTensor
from glm_jax.quant.tensor import dequantize as dequantize
from glm_jax.quant.tiled import TiledWeight as TiledWeight
from glm_jax.quant.tiled import tile as tile
from glm_jax.quant.tiled import untile as untile
from glm_jax.quant.weight import Weight as Weight
