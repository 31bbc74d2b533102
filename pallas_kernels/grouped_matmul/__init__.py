"""Products of many rows with quantised matrices, of which each block of rows may have its own."""

from pallas_kernels.grouped_matmul.op import Blocks as Blocks
from pallas_kernels.grouped_matmul.op import gated as gated
from pallas_kernels.grouped_matmul.op import height as height
from pallas_kernels.grouped_matmul.op import matmul as matmul
