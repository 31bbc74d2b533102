"""Products of few rows with quantized matrices."""

from pallas_kernels.quant_matmul.op import fused_linear as fused_linear
from pallas_kernels.quant_matmul.types import LinearOutput as LinearOutput
from pallas_kernels.quant_matmul.types import SumSq as SumSq
