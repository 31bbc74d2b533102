"""The three operations of absorbed attention: block sizes, checks and the launches."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _device, tuned
from pallas_kernels._implementation import Implementation, select_implementation
from pallas_kernels._kernel import Constant
from pallas_kernels._kernel_args import array_or, compute_dtype, tile_operands
from pallas_kernels._launch import CompileOptions, KernelModule, launch
from pallas_kernels.mla_decode.config import (
    FlashDecodeConfig,
    ProjectionConfig,
    flash_decode_heuristic,
    projection_heuristic,
)
from pallas_kernels.mla_decode.reference import absorbed_q_proj_ref, combine_v_proj_ref, flash_decode_ref
from pallas_kernels.mla_decode.types import AttentionDims, LatentCacheArrays, SplitKVPartials
from pallas_kernels.quant_matmul.types import SumSq
from pallas_kernels.tiles import Tiles

kernels = KernelModule("pallas_kernels.mla_decode.triton")
_MAX_BLOCK_N = 256  # outputs of a query that a program computes at once


def absorbed_q_proj(
    dims: AttentionDims,
    a: jax.Array,
    sum_sq: tuple[SumSq, SumSq],
    layer_index: jax.Array,
    positions: jax.Array,
    cos_sin: jax.Array,
    q_b: Tiles,
    k_b: Tiles,
    cache: LatentCacheArrays,
    *,
    cache_layer_offset: int = 0,
    dtype: DTypeLike,
    config: ProjectionConfig | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, LatentCacheArrays]:
    """Computes absorbed queries, and writes the new tokens into the cache.

    Args:
        dims: Sizes of the attention.
        a: ``[M, Q + R + P]``: query latent, key-value latent and rope key. Each latent is multiplied by the weight of
            its norm but not by its ``1 / rms``.
        sum_sq: Sums of squares of the query latent and of the key-value latent.
        layer_index: ``int32 [1]``, index of the layer in the weights.
        positions: ``int32 [M]``; M is B sequences times T tokens, in that order.
        cos_sin: ``[2, M, P / 2]``, cosines and sines.
        q_b: ``[L, N * (Hn + P), Q]``.
        k_b: ``[L, N, R, Hn]``: its outputs are the latents. It has scales of its inputs instead of its outputs.
        cache: Cache to write to; the result reuses its memory.
        cache_layer_offset: Added to ``layer_index`` for the index of the layer in the cache.
        dtype: Dtype of the queries.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`. The kernel needs the sums of
            squares in one array, those of the query latent first.

    Returns:
        Queries ``[M, N, R + P]`` with their rope part rotated, and the cache.

    Raises:
        NotImplementedError: If the named implementation cannot run.
    """
    q_norm, kv_norm = sum_sq
    reason = None
    if q_norm.first_block or q_norm.partials.shape != kv_norm.partials.shape:
        reason = "sums of squares of the queries' latent and of the latent are in one array, in this order"
    if select_implementation(implementation, reason) == "reference":
        return absorbed_q_proj_ref(
            dims,
            a,
            sum_sq,
            layer_index,
            positions,
            cos_sin,
            q_b,
            k_b,
            cache,
            cache_layer_offset=cache_layer_offset,
            dtype=dtype,
        )
    m, width = a.shape[0], cache.data.shape[-1]
    config = config or tuned.lookup_config(absorbed_q_proj_tuning_key(dims, m, q_b, k_b))
    programs = dims.heads * (k_b.num_tiles // config.tiles_per_program)
    results = launch(
        kernels.absorbed_q_proj_kernel,
        {
            "a": a,
            "sum_sq": q_norm.partials,
            "layer_index": layer_index,
            "positions": positions,
            "cos_sin": cos_sin,
            "page_table": array_or(cache.page_table, positions),
            **tile_operands(q_b, "q_b"),
            "k_b_packed": k_b.packed,
            "k_b_input_scales": array_or(k_b.input_scales, a),
            "cache_in": cache.data,
            "cache_scales_in": array_or(cache.scales, a),
        },
        {
            "queries": jax.ShapeDtypeStruct((m, dims.heads, width), dtype),
            "scratch": jax.ShapeDtypeStruct((programs, m, dims.nope + dims.rope), dtype),
            "cache": jax.ShapeDtypeStruct(cache.data.shape, cache.data.dtype),
            "cache_scales": jax.ShapeDtypeStruct((1,) if cache.scales is None else cache.scales.shape, jnp.float32),
        },
        {
            "M": m,
            "TOKENS": m // cache.batch_size,
            "DIMS": dims,
            "CACHE": cache.layout,
            "CACHE_LAYER_OFFSET": cache_layer_offset,
            "Q_NORM": q_norm.layout(dims.eps),
            "KV_NORM": kv_norm.layout(dims.eps),
            "DTYPE": compute_dtype(dtype),
            **_projection_constants(dims, q_b, k_b, config),
        },
        grid=(programs + 1, math.ceil(m / config.block_m)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={"cache_in": "cache"} | ({} if cache.scales is None else {"cache_scales_in": "cache_scales"}),
    )
    scales = None if cache.scales is None else results["cache_scales"]
    return results["queries"], LatentCacheArrays(results["cache"], scales, cache.page_table)


def _projection_constants(dims: AttentionDims, q_b: Tiles, k_b: Tiles, config: ProjectionConfig) -> dict[str, Constant]:
    input_scale_sets = 0 if k_b.input_scales is None else k_b.input_scales.shape[-2]
    tiles_per_set = k_b.num_tiles // max(1, input_scale_sets)
    return {
        "Q_B": q_b.layout,
        "K_B": k_b.layout,
        "INPUT_SCALE_SETS": input_scale_sets,
        "TILES_PER_PROGRAM": config.tiles_per_program,
        "BLOCK_M": config.block_m,
        "Q_BLOCK_N": 64 * math.gcd(_MAX_BLOCK_N // 64, (dims.nope + dims.rope) // 64),
        "K_BLOCK_N": 64 * math.gcd(_MAX_BLOCK_N // 64, config.tiles_per_program, tiles_per_set),
    }


def flash_decode(
    dims: AttentionDims,
    query: jax.Array,
    cache: LatentCacheArrays,
    layer_index: jax.Array,
    positions: jax.Array,
    *,
    cache_layer_offset: int = 0,
    config: FlashDecodeConfig | None = None,
    implementation: Implementation | None = None,
) -> SplitKVPartials:
    """Computes attention over the cached rows up to each token's own, in splits.

    Args:
        dims: Sizes of the attention.
        query: ``[M, N, R + P]`` from :func:`absorbed_q_proj`.
        cache: Cache with the new tokens in it.
        layer_index: ``int32 [1]``, index of the layer in the weights.
        positions: ``int32 [M]``.
        cache_layer_offset: Added to ``layer_index`` for the index of the layer in the cache.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`. The kernel needs pages of
            whole blocks of rows.

    Returns:
        Partial results, for :func:`combine_v_proj`.

    Raises:
        NotImplementedError: If the named implementation cannot run.
    """
    m, batch = query.shape[0], cache.batch_size
    rows = m // batch * dims.heads
    config = config or tuned.lookup_config(flash_decode_tuning_key(rows, cache))
    reason = None
    if cache.page_table is not None and cache.data.shape[2] % config.block_s:
        reason = f"pages of {cache.data.shape[2]} slots cannot be read {config.block_s} at a time"
    if select_implementation(implementation, reason) == "reference":
        return flash_decode_ref(dims, query, cache, layer_index, positions, cache_layer_offset=cache_layer_offset)
    per_query = jax.ShapeDtypeStruct((batch, config.splits, rows), jnp.float32)
    results = launch(
        kernels.flash_decode_kernel,
        {
            "queries": query,
            "cache": cache.data,
            "cache_scales": array_or(cache.scales, layer_index),
            "page_table": array_or(cache.page_table, layer_index),
            "layer_index": layer_index,
            "positions": positions,
        },
        {
            "acc": jax.ShapeDtypeStruct((*per_query.shape, dims.latent), jnp.float32),
            "row_max": per_query,
            "row_sum": per_query,
        },
        {
            "TOKENS": m // batch,
            "DIMS": dims,
            "CACHE": cache.layout,
            "CACHE_LAYER_OFFSET": cache_layer_offset,
            "SPLITS": config.splits,
            "BLOCK_Q": config.block_q,
            "BLOCK_S": config.block_s,
            "DTYPE": compute_dtype(query.dtype),
        },
        grid=(config.splits, math.ceil(rows / config.block_q), batch),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
    )
    return SplitKVPartials(
        results["acc"], results["row_max"], results["row_sum"], positions, cache.capacity, config.block_s
    )


def combine_v_proj(
    dims: AttentionDims,
    partials: SplitKVPartials,
    layer_index: jax.Array,
    v_b: Tiles,
    *,
    dtype: DTypeLike,
    config: ProjectionConfig | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Combines the splits of :func:`flash_decode` and projects the latents to values.

    Args:
        dims: Sizes of the attention.
        partials: Partial results of :func:`flash_decode`.
        layer_index: ``int32 [1]``, index of the layer.
        v_b: ``[L, N, Hv, R]``.
        dtype: Dtype of the result.
        config: Block sizes; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        ``[M, N * Hv]``.

    Raises:
        NotImplementedError: If the named implementation cannot run.
    """
    if select_implementation(implementation) == "reference":
        return combine_v_proj_ref(dims, partials, layer_index, v_b, dtype=dtype)
    batch, splits, rows, latent = partials.acc.shape
    tokens = rows // dims.heads
    m = batch * tokens
    config = config or tuned.lookup_config(combine_v_proj_tuning_key(dims, m, v_b))
    results = launch(
        kernels.combine_v_proj_kernel,
        {
            "acc": partials.acc,
            "row_max": partials.row_max,
            "row_sum": partials.row_sum,
            "layer_index": layer_index,
            "positions": partials.positions,
            **tile_operands(v_b),
        },
        {
            "out": jax.ShapeDtypeStruct((m, dims.heads * dims.value_dim), dtype),
            "scratch": jax.ShapeDtypeStruct((dims.heads * v_b.num_tiles, m, latent), dtype),
        },
        {
            "M": m,
            "TOKENS": tokens,
            "DIMS": dims,
            "CAPACITY": partials.capacity,
            "SPLITS": splits,
            "SPLIT_BLOCK": partials.block_size,
            "V_B": v_b.layout,
            "BLOCK_M": config.block_m,
            "SPLITS_PER_STEP": min(16, splits),
            "DTYPE": compute_dtype(dtype),
        },
        grid=(dims.heads, v_b.num_tiles, math.ceil(m / config.block_m)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
    )
    return results["out"]


def absorbed_q_proj_tuning_key(
    dims: AttentionDims, rows: int, q_b: Tiles, k_b: Tiles
) -> tuned.TuningKey[ProjectionConfig]:
    """Returns the sizes that the block sizes of :func:`absorbed_q_proj` depend on; ``rows`` are its tokens."""
    key = f"{tuned.rows_bucket(rows)} h{dims.heads} n{dims.nope} p{dims.rope} q{dims.query_latent} r{dims.latent}"
    kinds = f"{q_b.kind} g{q_b.group_size} {k_b.kind}"
    space = {
        "tiles_per_program": tuple(n for n in (1, 2, 4, 8) if k_b.num_tiles % n == 0),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6),
    }
    target = _device.current_target()
    heuristic = projection_heuristic(rows, k_b.num_tiles, dims.heads, target.multiprocessors if target else 128)
    return tuned.TuningKey("queries", f"{key} {kinds}", heuristic, _with_block_m(rows, space))


def flash_decode_tuning_key(num_queries: int, cache: LatentCacheArrays) -> tuned.TuningKey[FlashDecodeConfig]:
    """Returns the sizes that the block sizes of :func:`flash_decode` depend on; queries are those of one sequence."""
    batch, slots, page, width = cache.batch_size, cache.capacity, cache.data.shape[2], cache.data.shape[-1]
    target = _device.current_target()
    shared_memory, multiprocessors = (target.shared_memory, target.multiprocessors) if target else (101_376, 128)
    itemsize = cache.data.dtype.itemsize
    heuristic = flash_decode_heuristic(num_queries, batch, slots, width, itemsize, shared_memory, multiprocessors)
    key = f"q{num_queries} b{batch} s{1 << (slots - 1).bit_length()} w{width} {cache.data.dtype.name}"
    key += "" if cache.page_table is None else f" pages{page}"
    space = {
        "splits": tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * 16 <= slots),
        "block_s": tuple(n for n in (16, 32, 64) if cache.page_table is None or page % n == 0),
        "num_stages": (1, 2, 3, 4),
        "num_warps": (4, 8),
        "block_q": (16, 32),
    }
    return tuned.TuningKey("attend", key, heuristic, space)


def combine_v_proj_tuning_key(dims: AttentionDims, rows: int, v_b: Tiles) -> tuned.TuningKey[ProjectionConfig]:
    """Returns the sizes that the block sizes of :func:`combine_v_proj` depend on; ``rows`` are its tokens."""
    key = f"{tuned.rows_bucket(rows)} h{dims.heads} r{dims.latent} v{dims.value_dim} {v_b.kind} g{v_b.group_size}"
    space = {"num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.TuningKey("values", key, ProjectionConfig(), _with_block_m(rows, space))


def _with_block_m(rows: int, space: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return space if rows <= 16 else {**space, "block_m": (16, 32)}
