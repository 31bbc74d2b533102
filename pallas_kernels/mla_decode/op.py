"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._launch import LaunchError, Shape, launch
from pallas_kernels.mla_decode.config import AttendShape, ProjectShape, attend_shape, project_shape
from pallas_kernels.quant_matmul.op import Squares, compute_dtype, constants, operands
from pallas_kernels.tiles import Tiles

_WIDEST = 256  # outputs that a program of the queries computes at once
_STORED = {"int8": "int8", "uint8": "fp8"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Sizes of the attention.

    Attributes:
        heads: query heads.
        nope: width of the part of a query without position.
        rope: width of the part with it.
        latent: width of a latent.
        value: width of a head's value.
        query_latent: width of the queries' own latent.
        interleave: whether rotated pairs are neighbours.
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
    def scale(self) -> float:
        """Of the scores."""
        return (self.nope + self.rope) ** -0.5


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "pages"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class Cache:
    """Rows ``[latent | rope key]`` of all layers, for each row of the batch in one piece or in pages.

    Attributes:
        codes: ``[L, B, S, R + P]``, bfloat16 or float32 values, int8 codes, or uint8 with the bits of float8 e4m3. In
            pages ``[L, pages, slots of a page, R + P]``.
        scales: float32, like the codes but for the last axis of 2, of 8-bit codes, else None.
        pages: int32 ``[B, pages of a row]``, where slot ``s`` lies in page ``pages[b, s // slots of a page]``; or None.
    """

    codes: jax.Array
    scales: jax.Array | None = None
    pages: jax.Array | None = None

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.codes.shape[1] if self.pages is None else self.pages.shape[0]

    @property
    def slots(self) -> int:
        """Tokens that a row of the batch has room for."""
        return self.codes.shape[2] * (1 if self.pages is None else self.pages.shape[1])

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        _, pages, page, _ = self.codes.shape
        paged = {"PAGE": 0, "POOL": 0} if self.pages is None else {"PAGE": page, "POOL": pages * page}
        return {"BATCH": self.batch, "SLOTS": self.slots, "CACHE": self.kind, **paged}

    @property
    def kind(self) -> str:
        """What a kernel calls it: "int8", "fp8" or "plain"."""
        return _STORED.get(self.codes.dtype.name, "plain")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sums", "tops", "totals", "positions"],
    meta_fields=["slots", "block"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What shares of the cached rows amount to. A row of the batch has as many as its length asks for.

    Attributes:
        sums: float32 ``[B, shares, T * N, R]``, of latents by their weights.
        tops: float32 ``[B, shares, T * N]``, the largest scores.
        totals: float32 ``[B, shares, T * N]``, sums of exponentials.
        positions: int32 ``[B * T]``, of the tokens.
        slots: capacity of the cache.
        block: rows that a share is a multiple of.
    """

    sums: jax.Array
    tops: jax.Array
    totals: jax.Array
    positions: jax.Array
    slots: int
    block: int


def queries(
    att: Attention,
    a: jax.Array,
    squares: tuple[Squares, Squares],
    place: jax.Array,
    positions: jax.Array,
    table: jax.Array,
    q_b: Tiles,
    k_b: Tiles,
    cache: Cache,
    *,
    cache_from: int = 0,
    dtype: Any,
    shape: ProjectShape | None = None,
) -> tuple[jax.Array, Cache]:
    """Queries in the space of the latents, and the cache with the new tokens in it.

    Args:
        att: sizes.
        a: ``[M, Q + R + P]``: queries' latent, latent and rope key before their norms' factors, each already multiplied
            by its norm's weight.
        squares: of the queries' latent, and of the latent.
        place: int32 ``[1]``, index of the layer in the weights.
        positions: int32 ``[M]``, M = batch times tokens per row, in that order.
        table: cosines and sines ``[2, M, P / 2]``.
        q_b: ``[L, N * (H + P), Q]``.
        k_b: ``[L, N, R, H]``: outputs are the latents. It has factors of its inputs in place of scales.
        cache: aliased by the result.
        cache_from: what to add to ``place`` for the index of the layer in the cache.
        dtype: of the queries.
        shape: block sizes; chosen unless given.

    Returns:
        Queries ``[M, N, R + P]``, their rope part rotated; the cache.
    """
    m, width = a.shape[0], cache.codes.shape[-1]
    shape = shape or tuned.best(queries_problem(att, m, q_b, k_b))
    programs = att.heads * (k_b.tiles // shape.per)
    head = att.nope + att.rope
    sets = 0 if k_b.factors is None else k_b.factors.shape[-2]
    q_squares, k_squares = squares
    if q_squares.first or q_squares.parts.shape != k_squares.parts.shape:
        raise LaunchError("sums of squares of the queries' latent and of the latent are in one array, in this order")
    from pallas_kernels.mla_decode.triton import queries_kernel

    made, _, codes, scales = launch(
        queries_kernel,
        [
            a,
            q_squares.parts,
            place,
            positions,
            table,
            positions if cache.pages is None else cache.pages,
            *operands(q_b),
            k_b.words,
            a if k_b.factors is None else k_b.factors,
            cache.codes,
            a if cache.scales is None else cache.scales,
        ],
        [
            jax.ShapeDtypeStruct((m, att.heads, width), dtype),
            jax.ShapeDtypeStruct((programs, m, head), dtype),
            jax.ShapeDtypeStruct(cache.codes.shape, cache.codes.dtype),
            jax.ShapeDtypeStruct((1,) if cache.scales is None else cache.scales.shape, jnp.float32),
        ],
        grid=(programs + 1, math.ceil(m / shape.block_m)),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        aliases={11: 2} | ({} if cache.scales is None else {12: 3}),
        M=m,
        T=m // cache.batch,
        HEADS=att.heads,
        NOPE=att.nope,
        P=att.rope,
        RQ=att.query_latent,
        R=att.latent,
        **cache.constants,
        LATENT_TILES=k_b.tiles,
        PER=shape.per,
        BM=shape.block_m,
        EPS=att.eps,
        ALL_PARTS=q_squares.parts.shape[1],
        Q_PARTS=q_squares.count,
        K_FIRST=k_squares.first,
        K_PARTS=k_squares.count,
        INTERLEAVE=att.interleave,
        CACHE_FROM=cache_from,
        DT=compute_dtype(dtype),
        **_named(q_b, "Q_", without=("K",)),
        **{f"K_{name}": constants(k_b)[name] for name in ("CHUNKS", "PER_WORD", "KIND")},
        K_INPUT_TILES=sets,
        QN=64 * math.gcd(_WIDEST // 64, head // 64),
        KN=64 * math.gcd(_WIDEST // 64, shape.per, k_b.tiles // max(1, sets)),
    )
    return made, Cache(codes, None if cache.scales is None else scales, cache.pages)


def attend(
    att: Attention,
    query: jax.Array,
    cache: Cache,
    place: jax.Array,
    positions: jax.Array,
    *,
    cache_from: int = 0,
    shape: AttendShape | None = None,
) -> Parts:
    """Attention over the cached rows up to each token's own, in shares.

    Args:
        att: sizes.
        query: ``[M, N, R + P]`` from :func:`queries`.
        cache: with the new tokens in it.
        place: int32 ``[1]``, as for :func:`queries`.
        positions: int32 ``[M]``.
        cache_from: as for :func:`queries`.
        shape: block sizes; chosen for the card unless given.

    Returns:
        What :func:`values` puts together.

    Raises:
        LaunchError: if pages do not hold whole blocks of rows.
    """
    m, batch, slots = query.shape[0], cache.batch, cache.slots
    tokens = m // batch
    rows = tokens * att.heads
    shape = shape or tuned.best(attend_problem(rows, cache))
    if cache.pages is not None and cache.codes.shape[2] % shape.block_s:
        raise LaunchError(f"pages of {cache.codes.shape[2]} slots cannot be read {shape.block_s} at a time")
    from pallas_kernels.mla_decode.triton import attend_kernel

    number = jax.ShapeDtypeStruct((batch, shape.splits, rows), jnp.float32)
    parts, tops, totals = launch(
        attend_kernel,
        [
            query,
            cache.codes,
            place if cache.scales is None else cache.scales,
            place if cache.pages is None else cache.pages,
            place,
            positions,
        ],
        [jax.ShapeDtypeStruct((*number.shape, att.latent), jnp.float32), number, number],
        grid=(shape.splits, math.ceil(rows / shape.block_q), batch),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        T=tokens,
        HEADS=att.heads,
        R=att.latent,
        P=att.rope,
        **cache.constants,
        SPLITS=shape.splits,
        BQ=shape.block_q,
        BS=shape.block_s,
        SCALE=att.scale,
        CACHE_FROM=cache_from,
        DT=compute_dtype(query.dtype),
    )
    return Parts(parts, tops, totals, positions, slots, shape.block_s)


def values(
    att: Attention,
    parts: Parts,
    place: jax.Array,
    v_b: Tiles,
    *,
    dtype: Any,
    shape: ProjectShape | None = None,
) -> jax.Array:
    """The shares of :func:`attend` put together and projected: ``[M, N * V]``.

    Args:
        att: sizes.
        parts: from :func:`attend`.
        place: int32 ``[1]``, index of the layer.
        v_b: ``[L, N, V, R]``.
        dtype: of the result.
        shape: block sizes; chosen unless given.
    """
    batch, splits, rows, latent = parts.sums.shape
    tokens = rows // att.heads
    m = batch * tokens
    shape = shape or tuned.best(values_problem(att, m, v_b))
    from pallas_kernels.mla_decode.triton import values_kernel

    out, _ = launch(
        values_kernel,
        [parts.sums, parts.tops, parts.totals, place, parts.positions, *operands(v_b)],
        [
            jax.ShapeDtypeStruct((m, att.heads * att.value), dtype),
            jax.ShapeDtypeStruct((att.heads * v_b.tiles, m, latent), dtype),
        ],
        grid=(att.heads, v_b.tiles, math.ceil(m / shape.block_m)),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        M=m,
        T=tokens,
        HEADS=att.heads,
        R=latent,
        V=att.value,
        SLOTS=parts.slots,
        SPLITS=splits,
        BLOCK=parts.block,
        BM=shape.block_m,
        BS=min(16, splits),
        DT=compute_dtype(dtype),
        **_named(v_b, "", without=("K",)),
    )
    return out


def queries_problem(att: Attention, rows: int, q_b: Tiles, k_b: Tiles) -> tuned.Problem[ProjectShape]:
    """What block sizes of :func:`queries` depend on."""
    key = f"{tuned.rows_key(rows)} h{att.heads} n{att.nope} p{att.rope} q{att.query_latent} r{att.latent}"
    per = tuple(n for n in (1, 2, 4, 8) if k_b.tiles % n == 0)
    axes = {"per": per, "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    kinds = f"{q_b.kind} g{q_b.group} {k_b.kind}"
    target = _device.target()
    rule = project_shape(rows, k_b.tiles, att.heads, target.multiprocessors if target else 128)
    return tuned.Problem("queries", f"{key} {kinds}", rule, _with_rows(rows, axes))


def attend_problem(queries: int, cache: Cache) -> tuned.Problem[AttendShape]:
    """What block sizes of :func:`attend` depend on; ``queries`` are those of one row of the batch."""
    batch, slots, page, width = cache.batch, cache.slots, cache.codes.shape[2], cache.codes.shape[-1]
    target = _device.target()
    memory, count = (target.shared_memory, target.multiprocessors) if target else (101_376, 128)
    rule = attend_shape(queries, batch, slots, width, cache.codes.dtype.itemsize, memory, count)
    key = f"q{queries} b{batch} s{1 << (slots - 1).bit_length()} w{width} {cache.codes.dtype.name}"
    key += "" if cache.pages is None else f" pages{page}"
    axes = {
        "splits": tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * 16 <= slots),
        "block_s": tuple(n for n in (16, 32, 64) if cache.pages is None or page % n == 0),
        "num_stages": (1, 2, 3, 4),
        "num_warps": (4, 8),
        "block_q": (16, 32),
    }
    return tuned.Problem("attend", key, rule, axes)


def values_problem(att: Attention, rows: int, v_b: Tiles) -> tuned.Problem[ProjectShape]:
    """What block sizes of :func:`values` depend on."""
    key = f"{tuned.rows_key(rows)} h{att.heads} r{att.latent} v{att.value} {v_b.kind} g{v_b.group}"
    axes = {"num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    return tuned.Problem("values", key, ProjectShape(), _with_rows(rows, axes))


def _with_rows(rows: int, axes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return axes if rows <= 16 else {**axes, "block_m": (16, 32)}


def _named(weight: Tiles, prefix: str, without: Any = ()) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in constants(weight).items() if name not in without}
