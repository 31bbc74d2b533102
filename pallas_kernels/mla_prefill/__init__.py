"""Causal attention of many new tokens, over expanded keys and values of every head."""

from pallas_kernels.mla_prefill.op import flash_attention as flash_attention
from pallas_kernels.mla_prefill.op import merge_attn_states as merge_attn_states
