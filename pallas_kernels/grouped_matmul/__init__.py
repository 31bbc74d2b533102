"""Products of many rows with quantized matrices, with one matrix for all rows or one for each block of rows."""

from pallas_kernels.grouped_matmul.config import choose_block_m as choose_block_m
from pallas_kernels.grouped_matmul.op import gated_linear_unit as gated_linear_unit
from pallas_kernels.grouped_matmul.op import grouped_matmul as grouped_matmul
from pallas_kernels.grouped_matmul.types import RowBlocks as RowBlocks
