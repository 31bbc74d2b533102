"""Products of activations with quantized matrices."""

from pallas_kernels.quant_matmul.op import LinearOutput as LinearOutput
from pallas_kernels.quant_matmul.op import SumSq as SumSq
from pallas_kernels.quant_matmul.op import fused_linear as fused_linear
