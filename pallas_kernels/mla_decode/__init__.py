"""Absorbed attention of few new tokens over the latent cache."""

from pallas_kernels.mla_decode.op import absorbed_q_proj as absorbed_q_proj
from pallas_kernels.mla_decode.op import combine_v_proj as combine_v_proj
from pallas_kernels.mla_decode.op import flash_decode as flash_decode
from pallas_kernels.mla_decode.types import AttentionDims as AttentionDims
from pallas_kernels.mla_decode.types import LatentCacheArrays as LatentCacheArrays
from pallas_kernels.mla_decode.types import SplitKVPartials as SplitKVPartials
