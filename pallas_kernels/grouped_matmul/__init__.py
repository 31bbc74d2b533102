"""Products of many rows with quantized matrices, of which each block of rows may have its own."""

from pallas_kernels.grouped_matmul.op import RowBlocks as RowBlocks
from pallas_kernels.grouped_matmul.op import choose_block_m as choose_block_m
from pallas_kernels.grouped_matmul.op import gated_linear_unit as gated_linear_unit
from pallas_kernels.grouped_matmul.op import grouped_matmul as grouped_matmul
