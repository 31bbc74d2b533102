"""Attention of few new tokens over the latent cache."""

from pallas_kernels.mla_decode.op import Attention as Attention
from pallas_kernels.mla_decode.op import Cache as Cache
from pallas_kernels.mla_decode.op import Parts as Parts
from pallas_kernels.mla_decode.op import attend as attend
from pallas_kernels.mla_decode.op import queries as queries
from pallas_kernels.mla_decode.op import values as values
