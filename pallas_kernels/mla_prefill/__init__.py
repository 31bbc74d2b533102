"""Causal attention of many new tokens, over keys and values of every head."""

from pallas_kernels.mla_prefill.op import flash as flash
from pallas_kernels.mla_prefill.op import merge as merge
