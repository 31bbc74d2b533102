"""Attention of one new token of each row over the latent cache: queries, shares of the attention, values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels.mla_decode import (
    AttentionDims,
    LatentCacheArrays,
    SplitKVPartials,
    absorbed_q_proj,
    combine_v_proj,
    flash_decode,
)
from pallas_kernels.mla_decode.op import absorbed_q_proj_tuning_key, combine_v_proj_tuning_key, flash_decode_tuning_key
from pallas_kernels.mla_decode.reference import (
    absorbed_q_proj_ref,
    combine_splits_ref,
    combine_v_proj_ref,
    flash_decode_ref,
)
from pallas_kernels.quant_matmul import SumSq
from pallas_kernels.specs.base import EPS, Arrays, KernelSpec, Sweep, array_nbytes, layer_nbytes
from pallas_kernels.tiles import WeightKind

_CACHE_CAPACITY, _TOTAL_SPLITS, _BLOCK_SIZE = 256, 64, 32


def flash_decode_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Attention over full contexts, in every storage of the cache."""
    for cache in sweep.cache_kinds:
        for context in sweep.context_lengths:
            yield from (_flash_decode_spec(sweep, cache, context, rows) for rows in sweep.batch_sizes)


def absorbed_q_proj_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Queries and the new row of the cache, in every storage of the weights."""
    yield from (_absorbed_q_proj_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def combine_v_proj_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Shares put together and projected, in every storage of the weights; many shares for one row."""
    yield from (
        _combine_v_proj_spec(sweep, kind, rows, max(1, _TOTAL_SPLITS // rows))
        for kind in sweep.weight_kinds
        for rows in sweep.batch_sizes
    )


def _attention_dims(sweep: Sweep) -> AttentionDims:
    w = sweep.dims
    return AttentionDims(
        heads=w.heads, nope=w.nope, rope=w.rope, latent=w.latent, value=w.value, query_latent=w.query_latent,
        interleave=True, eps=EPS,
    )  # fmt: skip


def _flash_decode_spec(sweep: Sweep, kind: str, context: int, rows: int) -> KernelSpec:
    w, sizes = sweep.dims, _attention_dims(sweep)
    width = w.latent + w.rope

    def make(layers: int) -> tuple[Arrays, Arrays]:
        return {
            "query": random_arrays.random_normal((rows, w.heads, width), 1, sweep.dtype),
            "cache": LatentCacheArrays(*random_arrays.random_cache_rows((layers, rows, context, width), kind, 2)),
            "positions": jnp.full(rows, context - 1, jnp.int32),
        }, {}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[Any, Arrays]:
        return flash_decode(sizes, given["query"], given["cache"], place, given["positions"], config=shape), state

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[Any, Arrays]:
        return flash_decode_ref(sizes, given["query"], given["cache"], place, given["positions"]), state

    def view(given: Arrays, shares: Any, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
        return (combine_splits_ref(shares),)

    def nbytes(given: Arrays, state: Arrays) -> int:
        cache = given["cache"]
        held = cache.codes.nbytes + (0 if cache.scales is None else cache.scales.nbytes)
        return held // cache.codes.shape[0] + given["query"].nbytes

    full = f"{kind}/m{rows}/s{context}"
    # Weights of the values are rounded, and so are 8-bit rows in the dtype of the products.
    return KernelSpec(
        op="attend",
        name=full,
        make_inputs=make,
        run=run,
        reference=reference,
        comparable_outputs=view,
        activation_key="query",
        bytes_accessed=nbytes,
        tuning_key=lambda given: flash_decode_tuning_key(w.heads, given["cache"]),
        rounds_intermediates=True,
    )


def _absorbed_q_proj_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    w, sizes = sweep.dims, _attention_dims(sweep)
    width = w.query_latent + w.latent + w.rope

    def make(layers: int) -> tuple[Arrays, Arrays]:
        turns = random_arrays.random_normal((rows, w.rope // 2), 3)
        # One kernel leaves both: two blocks of columns of the queries' latent, and two of the latent.
        halves = jnp.asarray([w.query_latent, w.query_latent, w.latent, w.latent], jnp.float32) / 2
        parts = jnp.broadcast_to(halves[None], (rows, 4))
        return {
            "a": random_arrays.random_normal((rows, width), 1, sweep.dtype),
            "squares": (SumSq(parts, 0, 2), SumSq(parts, 2, 2)),
            "positions": jnp.arange(rows, dtype=jnp.int32) + 5,
            "table": jnp.stack([jnp.cos(turns), jnp.sin(turns)]).astype(sweep.dtype),
            "q_b": sweep.random_weight((layers, w.heads * (w.nope + w.rope), w.query_latent), kind, 2),
            "k_b": sweep.random_weight((layers, w.heads, w.latent, w.nope), kind, 4, transposed=True),
        }, {"cache": LatentCacheArrays(jnp.zeros((layers, rows, _CACHE_CAPACITY, w.latent + w.rope), sweep.dtype))}

    def call(function: Any, given: Arrays, state: Arrays, place: jax.Array, **options: Any) -> tuple[Any, Arrays]:
        names = ("positions", "table", "q_b", "k_b")
        arguments = (sizes, given["a"], given["squares"], place, *map(given.get, names), state["cache"])
        made, cache = function(*arguments, dtype=sweep.dtype, **options)
        return made, {"cache": cache}

    def view(given: Arrays, made: jax.Array, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
        codes = state["cache"].codes[place[0]]
        return made, codes[jnp.arange(rows, dtype=jnp.int32), given["positions"]]

    def nbytes(given: Arrays, state: Arrays) -> int:
        made = array_nbytes((rows, w.heads + 1, w.latent + w.rope), sweep.dtype)
        return layer_nbytes(given["q_b"], given["k_b"]) + given["a"].nbytes + made

    return KernelSpec(
        op="queries",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=lambda given, state, place, shape: call(absorbed_q_proj, given, state, place, shape=shape),
        reference=lambda given, state, place: call(absorbed_q_proj_ref, given, state, place),
        comparable_outputs=view,
        activation_key="a",
        bytes_accessed=nbytes,
        tuning_key=lambda given: absorbed_q_proj_tuning_key(sizes, rows, given["q_b"], given["k_b"]),
        rounds_intermediates=True,
    )


def _combine_v_proj_spec(sweep: Sweep, kind: WeightKind, rows: int, splits: int) -> KernelSpec:
    w, sizes = sweep.dims, _attention_dims(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        number = (rows, splits, w.heads)
        sums, tops = random_arrays.random_normal((*number, w.latent), 1), random_arrays.random_normal(number, 2)
        # Rows that fill all shares, of one block each.
        positions = jnp.full(rows, splits * _BLOCK_SIZE - 1, jnp.int32)
        parts = SplitKVPartials(
            sums,
            tops,
            1 + jnp.abs(random_arrays.random_normal(number, 3)),
            positions,
            splits * _BLOCK_SIZE,
            _BLOCK_SIZE,
        )
        return {"parts": parts, "v_b": sweep.random_weight((layers, w.heads, w.value, w.latent), kind, 4)}, {}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[jax.Array, Arrays]:
        return combine_v_proj(sizes, given["parts"], place, given["v_b"], dtype=sweep.dtype, config=shape), state

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[jax.Array, Arrays]:
        return combine_v_proj_ref(sizes, given["parts"], place, given["v_b"], dtype=sweep.dtype), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        made = array_nbytes((rows, w.heads, w.value), sweep.dtype)
        return layer_nbytes(given["v_b"]) + sum(part.nbytes for part in jax.tree.leaves(given["parts"])) + made

    return KernelSpec(
        op="values",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        reference=reference,
        comparable_outputs=lambda given, out, state, place: (out,),
        activation_key="parts",
        bytes_accessed=nbytes,
        tuning_key=lambda given: combine_v_proj_tuning_key(sizes, rows, given["v_b"]),
        rounds_intermediates=True,
    )
