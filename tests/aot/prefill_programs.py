"""The attention of a prompt at the real model's sizes, for an absent GPU."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.ops import mla_prefill
from pallas_kernels import CUDA_GRAPH_OPTIONS, aot, compiling_for

FLASH = Config.flash()


def trace_prefill(batch, tokens, slots, cache_dtype, sharding=None):
    """Traces the attention of one layer over a cache of several, as the model calls it."""

    def program(query, cache, layer, positions, k_b, v_b):
        return mla_prefill.prefill_attention(FLASH, query, cache, layer, positions, k_b, v_b)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    heads, latent = FLASH.num_attention_heads, FLASH.kv_lora_rank
    cache = jax.eval_shape(lambda: LatentCache.create(FLASH, batch, slots, cache_dtype, layers=2))
    return jax.jit(program).trace(
        array(batch, tokens, heads, FLASH.qk_head_dim),
        jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), cache),
        array(dtype=jnp.int32),
        array(batch, tokens, dtype=jnp.int32),
        array(heads, FLASH.qk_nope_head_dim, latent),
        array(heads, FLASH.v_head_dim, latent),
    )


def compile_prefill(argument):
    """Returns the launches and sizes of the program; runs in the child of :func:`pallas_kernels.aot.run_in_child`."""
    gpu = aot.find_gpu_spec(argument.pop("gpu"))
    sharding = SingleDeviceSharding(aot.topology_devices(gpu)[0])
    with compiling_for(gpu.target):
        report = aot.compile_traced(trace_prefill(**argument, sharding=sharding), CUDA_GRAPH_OPTIONS)
    return {
        "temp_bytes": report.temp_bytes,
        "before": [thunk.name or thunk.kind for thunk in report.launches(0)],
        "loop": [thunk.name or thunk.kind for thunk in report.launches(1)],
        "launches_outside_graphs": report.num_ungraphed_launches,
        "graph_pieces": report.num_cuda_graphs,
    }
