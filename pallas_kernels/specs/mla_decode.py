"""Attention of one new token of each sequence over the latent cache: queries, attention in splits, values."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels._implementation import Implementation
from pallas_kernels.mla_decode import (
    AttentionDims,
    LatentCacheArrays,
    SplitKVPartials,
    absorbed_q_proj,
    combine_v_proj,
    flash_decode,
)
from pallas_kernels.mla_decode.config import FlashDecodeConfig, ProjectionConfig
from pallas_kernels.mla_decode.op import absorbed_q_proj_tuning_key, combine_v_proj_tuning_key, flash_decode_tuning_key
from pallas_kernels.mla_decode.reference import combine_splits_ref
from pallas_kernels.quant_matmul import SumSq
from pallas_kernels.specs.base import EPS, Arrays, KernelSpec, Sweep, array_nbytes, layer_nbytes
from pallas_kernels.tiles import WeightKind

_CACHE_CAPACITY, _TOTAL_SPLITS, _BLOCK_SIZE = 256, 64, 32


def flash_decode_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields attention over full contexts, in every storage of the cache."""
    for cache in sweep.cache_kinds:
        for context in sweep.context_lengths:
            yield from (_flash_decode_spec(sweep, cache, context, rows) for rows in sweep.batch_sizes)


def absorbed_q_proj_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields queries and the new row of the cache, in every storage of the weights."""
    yield from (_absorbed_q_proj_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def combine_v_proj_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields the projection of combined splits, in every storage of the weights; small batches have many splits."""
    yield from (
        _combine_v_proj_spec(sweep, kind, rows, max(1, _TOTAL_SPLITS // rows))
        for kind in sweep.weight_kinds
        for rows in sweep.batch_sizes
    )


def _attention_dims(sweep: Sweep) -> AttentionDims:
    dims = sweep.dims
    return AttentionDims(
        heads=dims.heads, nope=dims.nope, rope=dims.rope, latent=dims.latent, value_dim=dims.value,
        query_latent=dims.query_latent, interleave=True, eps=EPS,
    )  # fmt: skip


def _flash_decode_spec(sweep: Sweep, kind: str, context: int, rows: int) -> KernelSpec:
    dims, attention = sweep.dims, _attention_dims(sweep)
    width = dims.latent + dims.rope

    def make(layers: int) -> tuple[Arrays, Arrays]:
        return {
            "query": random_arrays.random_normal((rows, dims.heads, width), 1, sweep.dtype),
            "cache": LatentCacheArrays(*random_arrays.random_cache_rows((layers, rows, context, width), kind, 2)),
            "positions": jnp.full(rows, context - 1, jnp.int32),
        }, {}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: FlashDecodeConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[SplitKVPartials, Arrays]:
        options = {"config": config, "implementation": implementation}
        return flash_decode(attention, layer_index=layer_index, **inputs, **options), state

    def view(inputs: Arrays, partials: SplitKVPartials, state: Arrays, layer_index: jax.Array) -> tuple[jax.Array, ...]:
        return (combine_splits_ref(partials),)

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        cache: LatentCacheArrays = inputs["cache"]
        stored = cache.data.nbytes + (0 if cache.scales is None else cache.scales.nbytes)
        return stored // cache.data.shape[0] + inputs["query"].nbytes

    return KernelSpec(
        op="attend",
        name=f"{kind}/m{rows}/s{context}",
        make_inputs=make,
        run=run,
        comparable_outputs=view,
        activation_key="query",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: flash_decode_tuning_key(dims.heads, inputs["cache"]),
        rounds_intermediates=True,  # softmax weights, and rows of 8 bits
    )


def _absorbed_q_proj_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    dims, attention = sweep.dims, _attention_dims(sweep)
    width = dims.query_latent + dims.latent + dims.rope

    def make(layers: int) -> tuple[Arrays, Arrays]:
        angles = random_arrays.random_normal((rows, dims.rope // 2), 3)
        # One kernel writes both sums: two blocks of columns of the query latent, and two of the key-value latent.
        halves = jnp.asarray([dims.query_latent, dims.query_latent, dims.latent, dims.latent], jnp.float32) / 2
        partials = jnp.broadcast_to(halves[None], (rows, 4))
        cache = jnp.zeros((layers, rows, _CACHE_CAPACITY, dims.latent + dims.rope), sweep.dtype)
        return {
            "a": random_arrays.random_normal((rows, width), 1, sweep.dtype),
            "sum_sq": (SumSq(partials, 0, 2), SumSq(partials, 2, 2)),
            "positions": jnp.arange(rows, dtype=jnp.int32) + 5,
            "cos_sin": jnp.stack([jnp.cos(angles), jnp.sin(angles)]).astype(sweep.dtype),
            "q_b": sweep.random_weight((layers, dims.heads * (dims.nope + dims.rope), dims.query_latent), kind, 2),
            "k_b": sweep.random_weight((layers, dims.heads, dims.latent, dims.nope), kind, 4, transposed=True),
        }, {"cache": LatentCacheArrays(cache)}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: ProjectionConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, Arrays]:
        options = {"dtype": sweep.dtype, "config": config, "implementation": implementation}
        queries, cache = absorbed_q_proj(attention, layer_index=layer_index, cache=state["cache"], **inputs, **options)
        return queries, {"cache": cache}

    def view(inputs: Arrays, queries: jax.Array, state: Arrays, layer_index: jax.Array) -> tuple[jax.Array, ...]:
        layer = state["cache"].data[layer_index[0]]
        return queries, layer[jnp.arange(rows, dtype=jnp.int32), inputs["positions"]]

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        written = array_nbytes((rows, dims.heads + 1, dims.latent + dims.rope), sweep.dtype)
        return layer_nbytes(inputs["q_b"], inputs["k_b"]) + inputs["a"].nbytes + written

    return KernelSpec(
        op="queries",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        comparable_outputs=view,
        activation_key="a",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: absorbed_q_proj_tuning_key(attention, rows, inputs["q_b"], inputs["k_b"]),
        rounds_intermediates=True,
    )


def _combine_v_proj_spec(sweep: Sweep, kind: WeightKind, rows: int, splits: int) -> KernelSpec:
    dims, attention = sweep.dims, _attention_dims(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        per_query = (rows, splits, dims.heads)
        partials = SplitKVPartials(
            acc=random_arrays.random_normal((*per_query, dims.latent), 1),
            row_max=random_arrays.random_normal(per_query, 2),
            row_sum=1 + jnp.abs(random_arrays.random_normal(per_query, 3)),
            # The cached rows fill all splits, of one block each.
            positions=jnp.full(rows, splits * _BLOCK_SIZE - 1, jnp.int32),
            capacity=splits * _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
        )
        return {
            "partials": partials,
            "v_b": sweep.random_weight((layers, dims.heads, dims.value, dims.latent), kind, 4),
        }, {}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: ProjectionConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, Arrays]:
        options = {"dtype": sweep.dtype, "config": config, "implementation": implementation}
        return combine_v_proj(attention, layer_index=layer_index, **inputs, **options), state

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        written = array_nbytes((rows, dims.heads, dims.value), sweep.dtype)
        return layer_nbytes(inputs["v_b"]) + sum(x.nbytes for x in jax.tree.leaves(inputs["partials"])) + written

    return KernelSpec(
        op="values",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        comparable_outputs=lambda inputs, out, state, layer_index: (out,),
        activation_key="partials",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: combine_v_proj_tuning_key(attention, rows, inputs["v_b"]),
        rounds_intermediates=True,
    )
