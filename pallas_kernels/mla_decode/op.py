"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import CompileOptions, LaunchError, launch
from pallas_kernels.mla_decode.config import (
    FlashDecodeConfig,
    ProjectionConfig,
    flash_decode_heuristic,
    projection_heuristic,
)
from pallas_kernels.quant_matmul.op import SumSq, compute_dtype, weight_constants, weight_operands
from pallas_kernels.tiles import Tiles

_MAX_BLOCK_N = 256  # outputs that a program of the queries computes at once
_CACHE_KINDS = {"int8": "int8", "uint8": "fp8"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionDims:
    """Sizes of the attention.

    Attributes:
        heads: query heads.
        nope: width of the part of a query without position.
        rope: width of the part with it.
        latent: width of a latent.
        value: width of a head's value.
        query_latent: width of the queries' own latent.
        interleave: whether rotated pairs are neighbors.
        eps: of the norms of the latents.
    """

    heads: int
    nope: int
    rope: int
    latent: int
    value: int
    query_latent: int
    interleave: bool
    eps: float

    @property
    def softmax_scale(self) -> float:
        """Of the scores."""
        return (self.nope + self.rope) ** -0.5


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "scales", "page_table"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class LatentCacheArrays:
    """Rows ``[latent | rope key]`` of all layers, for each row of the batch in one piece or in pages.

    Attributes:
        data: ``[L, B, S, R + P]``, bfloat16 or float32 values, int8 codes, or uint8 with the bits of float8 e4m3. In
            pages ``[L, pages, slots of a page, R + P]``.
        scales: float32, like the codes but for the last axis of 2, of 8-bit codes, else None.
        page_table: int32 ``[B, pages of a row]``, where slot ``s`` lies in page ``page_table[b, s // slots of a page]``; or None.
    """

    data: jax.Array
    scales: jax.Array | None = None
    page_table: jax.Array | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.data.shape[1] if self.page_table is None else self.page_table.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a row of the batch has room for."""
        return self.data.shape[2] * (1 if self.page_table is None else self.page_table.shape[1])

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        _, pages, page, _ = self.data.shape
        paged = {"PAGE": 0, "POOL": 0} if self.page_table is None else {"PAGE": page, "POOL": pages * page}
        return {"BATCH": self.batch_size, "SLOTS": self.capacity, "CACHE": self.kind, **paged}

    @property
    def kind(self) -> str:
        """What a kernel calls it: "int8", "fp8" or "plain"."""
        return _CACHE_KINDS.get(self.data.dtype.name, "plain")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["acc", "row_max", "row_sum", "positions"],
    meta_fields=["capacity", "block_size"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class SplitKVPartials:
    """What shares of the cached rows amount to. A row of the batch has as many as its length asks for.

    Attributes:
        acc: float32 ``[B, shares, T * N, R]``, of latents by their weights.
        row_max: float32 ``[B, shares, T * N]``, the largest scores.
        row_sum: float32 ``[B, shares, T * N]``, sums of exponentials.
        positions: int32 ``[B * T]``, of the tokens.
        capacity: capacity of the cache.
        block_size: rows that a share is a multiple of.
    """

    acc: jax.Array
    row_max: jax.Array
    row_sum: jax.Array
    positions: jax.Array
    capacity: int
    block_size: int


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
    dtype: Any,
    config: ProjectionConfig | None = None,
) -> tuple[jax.Array, LatentCacheArrays]:
    """Queries in the space of the latents, and the cache with the new tokens in it.

    Args:
        dims: sizes.
        a: ``[M, Q + R + P]``: queries' latent, latent and rope key before their norms' factors, each already multiplied
            by its norm's weight.
        sum_sq: of the queries' latent, and of the latent.
        layer_index: int32 ``[1]``, index of the layer in the weights.
        positions: int32 ``[M]``, M = batch times tokens per row, in that order.
        cos_sin: cosines and sines ``[2, M, P / 2]``.
        q_b: ``[L, N * (H + P), Q]``.
        k_b: ``[L, N, R, H]``: outputs are the latents. It has factors of its inputs in place of scales.
        cache: aliased by the result.
        cache_layer_offset: what to add to ``layer_index`` for the index of the layer in the cache.
        dtype: of the queries.
        config: block sizes; chosen unless given.

    Returns:
        Queries ``[M, N, R + P]``, their rope part rotated; the cache.
    """
    m, width = a.shape[0], cache.data.shape[-1]
    config = config or tuned.lookup_config(absorbed_q_proj_tuning_key(dims, m, q_b, k_b))
    programs = dims.heads * (k_b.num_tiles // config.per)
    head = dims.nope + dims.rope
    sets = 0 if k_b.input_scales is None else k_b.input_scales.shape[-2]
    q_squares, k_squares = sum_sq
    if q_squares.first_block or q_squares.partials.shape != k_squares.partials.shape:
        raise LaunchError("sums of squares of the queries' latent and of the latent are in one array, in this order")
    from pallas_kernels.mla_decode.triton import absorbed_q_proj_kernel

    made, _, codes, scales = launch(
        absorbed_q_proj_kernel,
        [
            a,
            q_squares.partials,
            layer_index,
            positions,
            cos_sin,
            positions if cache.page_table is None else cache.page_table,
            *weight_operands(q_b),
            k_b.packed,
            a if k_b.input_scales is None else k_b.input_scales,
            cache.data,
            a if cache.scales is None else cache.scales,
        ],
        [
            jax.ShapeDtypeStruct((m, dims.heads, width), dtype),
            jax.ShapeDtypeStruct((programs, m, head), dtype),
            jax.ShapeDtypeStruct(cache.data.shape, cache.data.dtype),
            jax.ShapeDtypeStruct((1,) if cache.scales is None else cache.scales.shape, jnp.float32),
        ],
        grid=(programs + 1, math.ceil(m / config.block_m)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={11: 2} | ({} if cache.scales is None else {12: 3}),
        M=m,
        T=m // cache.batch_size,
        HEADS=dims.heads,
        NOPE=dims.nope,
        P=dims.rope,
        RQ=dims.query_latent,
        R=dims.latent,
        **cache.constants,
        LATENT_TILES=k_b.num_tiles,
        PER=config.per,
        BM=config.block_m,
        EPS=dims.eps,
        ALL_PARTS=q_squares.partials.shape[1],
        Q_PARTS=q_squares.num_blocks,
        K_FIRST=k_squares.first_block,
        K_PARTS=k_squares.num_blocks,
        INTERLEAVE=dims.interleave,
        CACHE_FROM=cache_layer_offset,
        DT=compute_dtype(dtype),
        **_prefixed_constants(q_b, "Q_", without=("K",)),
        **{f"K_{name}": weight_constants(k_b)[name] for name in ("CHUNKS", "PER_WORD", "KIND")},
        K_INPUT_TILES=sets,
        QN=64 * math.gcd(_MAX_BLOCK_N // 64, head // 64),
        KN=64 * math.gcd(_MAX_BLOCK_N // 64, config.per, k_b.num_tiles // max(1, sets)),
    )
    return made, LatentCacheArrays(codes, None if cache.scales is None else scales, cache.page_table)


def flash_decode(
    dims: AttentionDims,
    query: jax.Array,
    cache: LatentCacheArrays,
    layer_index: jax.Array,
    positions: jax.Array,
    *,
    cache_layer_offset: int = 0,
    config: FlashDecodeConfig | None = None,
) -> SplitKVPartials:
    """Attention over the cached rows up to each token's own, in shares.

    Args:
        dims: sizes.
        query: ``[M, N, R + P]`` from :func:`absorbed_q_proj`.
        cache: with the new tokens in it.
        layer_index: int32 ``[1]``, as for :func:`absorbed_q_proj`.
        positions: int32 ``[M]``.
        cache_layer_offset: as for :func:`absorbed_q_proj`.
        config: block sizes; chosen for the card unless given.

    Returns:
        What :func:`combine_v_proj` puts together.

    Raises:
        LaunchError: if pages do not hold whole blocks of rows.
    """
    m, batch, slots = query.shape[0], cache.batch_size, cache.capacity
    tokens = m // batch
    rows = tokens * dims.heads
    config = config or tuned.lookup_config(flash_decode_tuning_key(rows, cache))
    if cache.page_table is not None and cache.data.shape[2] % config.block_s:
        raise LaunchError(f"pages of {cache.data.shape[2]} slots cannot be read {config.block_s} at a time")
    from pallas_kernels.mla_decode.triton import flash_decode_kernel

    number = jax.ShapeDtypeStruct((batch, config.splits, rows), jnp.float32)
    parts, tops, totals = launch(
        flash_decode_kernel,
        [
            query,
            cache.data,
            layer_index if cache.scales is None else cache.scales,
            layer_index if cache.page_table is None else cache.page_table,
            layer_index,
            positions,
        ],
        [jax.ShapeDtypeStruct((*number.shape, dims.latent), jnp.float32), number, number],
        grid=(config.splits, math.ceil(rows / config.block_q), batch),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        T=tokens,
        HEADS=dims.heads,
        R=dims.latent,
        P=dims.rope,
        **cache.constants,
        SPLITS=config.splits,
        BQ=config.block_q,
        BS=config.block_s,
        SCALE=dims.softmax_scale,
        CACHE_FROM=cache_layer_offset,
        DT=compute_dtype(query.dtype),
    )
    return SplitKVPartials(parts, tops, totals, positions, slots, config.block_s)


def combine_v_proj(
    dims: AttentionDims,
    partials: SplitKVPartials,
    layer_index: jax.Array,
    v_b: Tiles,
    *,
    dtype: Any,
    config: ProjectionConfig | None = None,
) -> jax.Array:
    """The shares of :func:`flash_decode` put together and projected: ``[M, N * V]``.

    Args:
        dims: sizes.
        partials: from :func:`flash_decode`.
        layer_index: int32 ``[1]``, index of the layer.
        v_b: ``[L, N, V, R]``.
        dtype: of the result.
        config: block sizes; chosen unless given.
    """
    batch, splits, rows, latent = partials.acc.shape
    tokens = rows // dims.heads
    m = batch * tokens
    config = config or tuned.lookup_config(combine_v_proj_tuning_key(dims, m, v_b))
    from pallas_kernels.mla_decode.triton import combine_v_proj_kernel

    out, _ = launch(
        combine_v_proj_kernel,
        [partials.acc, partials.row_max, partials.row_sum, layer_index, partials.positions, *weight_operands(v_b)],
        [
            jax.ShapeDtypeStruct((m, dims.heads * dims.value), dtype),
            jax.ShapeDtypeStruct((dims.heads * v_b.num_tiles, m, latent), dtype),
        ],
        grid=(dims.heads, v_b.num_tiles, math.ceil(m / config.block_m)),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        M=m,
        T=tokens,
        HEADS=dims.heads,
        R=latent,
        V=dims.value,
        SLOTS=partials.capacity,
        SPLITS=splits,
        BLOCK=partials.block_size,
        BM=config.block_m,
        BS=min(16, splits),
        DT=compute_dtype(dtype),
        **_prefixed_constants(v_b, "", without=("K",)),
    )
    return out


def absorbed_q_proj_tuning_key(
    dims: AttentionDims, rows: int, q_b: Tiles, k_b: Tiles
) -> tuned.TuningKey[ProjectionConfig]:
    """What block sizes of :func:`absorbed_q_proj` depend on."""
    key = f"{tuned.rows_bucket(rows)} h{dims.heads} n{dims.nope} p{dims.rope} q{dims.query_latent} r{dims.latent}"
    per = tuple(n for n in (1, 2, 4, 8) if k_b.num_tiles % n == 0)
    axes = {"per": per, "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    kinds = f"{q_b.kind} g{q_b.group_size} {k_b.kind}"
    target = _device.current_target()
    rule = projection_heuristic(rows, k_b.num_tiles, dims.heads, target.multiprocessors if target else 128)
    return tuned.TuningKey("queries", f"{key} {kinds}", rule, _add_block_m(rows, axes))


def flash_decode_tuning_key(num_queries: int, cache: LatentCacheArrays) -> tuned.TuningKey[FlashDecodeConfig]:
    """What block sizes of :func:`flash_decode` depend on; ``num_queries`` are those of one row of the batch."""
    batch, slots, page, width = cache.batch_size, cache.capacity, cache.data.shape[2], cache.data.shape[-1]
    target = _device.current_target()
    memory, count = (target.shared_memory, target.multiprocessors) if target else (101_376, 128)
    rule = flash_decode_heuristic(num_queries, batch, slots, width, cache.data.dtype.itemsize, memory, count)
    key = f"q{num_queries} b{batch} s{1 << (slots - 1).bit_length()} w{width} {cache.data.dtype.name}"
    key += "" if cache.page_table is None else f" pages{page}"
    axes = {
        "splits": tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * 16 <= slots),
        "block_s": tuple(n for n in (16, 32, 64) if cache.page_table is None or page % n == 0),
        "num_stages": (1, 2, 3, 4),
        "num_warps": (4, 8),
        "block_q": (16, 32),
    }
    return tuned.TuningKey("attend", key, rule, axes)


def combine_v_proj_tuning_key(dims: AttentionDims, rows: int, v_b: Tiles) -> tuned.TuningKey[ProjectionConfig]:
    """What block sizes of :func:`combine_v_proj` depend on."""
    key = f"{tuned.rows_bucket(rows)} h{dims.heads} r{dims.latent} v{dims.value} {v_b.kind} g{v_b.group_size}"
    axes = {"num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.TuningKey("values", key, ProjectionConfig(), _add_block_m(rows, axes))


def _add_block_m(rows: int, axes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return axes if rows <= 16 else {**axes, "block_m": (16, 32)}


def _prefixed_constants(weight: Tiles, prefix: str, without: Any = ()) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in weight_constants(weight).items() if name not in without}
