"""Products of activations with quantised matrices."""

from pallas_kernels.quant_matmul.op import Made as Made
from pallas_kernels.quant_matmul.op import Squares as Squares
from pallas_kernels.quant_matmul.op import linear as linear
