"""What a parameter is: specs of all parameters, and the storages of a weight (plain, quantized, tiled)."""

from glm_jax.weights.bf16_bits import Bfloat16Bits as Bfloat16Bits
from glm_jax.weights.codes import pack_nibbles as pack_nibbles
from glm_jax.weights.codes import unpack_nibbles as unpack_nibbles
from glm_jax.weights.dense_weight import as_weight_matrix as as_weight_matrix
from glm_jax.weights.presets import QUANT_PRESETS as QUANT_PRESETS
from glm_jax.weights.presets import QuantRules as QuantRules
from glm_jax.weights.quant_spec import QuantSpec as QuantSpec
from glm_jax.weights.quantization import quantize as quantize
from glm_jax.weights.quantized_tensor import QuantizedTensor as QuantizedTensor
from glm_jax.weights.quantized_tensor import dequantize as dequantize
from glm_jax.weights.tiled_weight import TiledWeight as TiledWeight
from glm_jax.weights.tiled_weight import tile_weight as tile_weight
from glm_jax.weights.tiled_weight import untile_weight as untile_weight
from glm_jax.weights.types import Weight as Weight
from glm_jax.weights.types import Weights as Weights
from glm_jax.weights.weight_matrix import WeightMatrix as WeightMatrix
