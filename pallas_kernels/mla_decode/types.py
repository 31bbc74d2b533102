"""Sizes of the attention, the latent cache, and partial results over its rows."""

from __future__ import annotations

import dataclasses
import functools

import jax

_QUANTIZED_CACHE_KINDS = {"int8": "int8", "uint8": "fp8"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionDims:
    """Sizes of the attention, also as one constexpr of the kernels.

    Attributes:
        heads: N, query heads.
        nope: Hn, width of the part of a query head without position.
        rope: P, width of the part with position, and of the rope key.
        latent: R, width of the key-value latent.
        value_dim: Hv, width of a head's value.
        query_latent: Q, width of the query latent.
        interleave: Whether rotated pairs are adjacent columns; otherwise they are half the width apart.
        eps: Epsilon of the norms of the latents.
    """

    heads: int
    nope: int
    rope: int
    latent: int
    value_dim: int
    query_latent: int
    interleave: bool
    eps: float

    @property
    def softmax_scale(self) -> float:
        """Softmax scale applied to the attention scores."""
        return (self.nope + self.rope) ** -0.5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """The static layout of a latent cache, as one constexpr of a kernel.

    Attributes:
        kind: "int8", "fp8", or "plain" for values.
        batch_size: Sequences in the cache.
        capacity: Slots of a sequence.
        page_size: Slots of a page; 0 if each sequence is contiguous.
        pool_size: Slots of all pages of a layer; 0 if each sequence is contiguous.
    """

    kind: str
    batch_size: int
    capacity: int
    page_size: int = 0
    pool_size: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "scales", "page_table"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class LatentCacheArrays:
    """Rows ``[latent | rope key]`` of all layers; each sequence is contiguous or in pages.

    Attributes:
        data: ``[L, B, S, R + P]``, or ``[L, pages, page size, R + P]`` in pages: bfloat16 or float32 values, int8
            qvalues, or uint8 with the bits of float8 e4m3.
        scales: Scales of 8-bit rows, float32 ``[L, B, S, 2]`` or ``[L, pages, page size, 2]`` for latent and rope key;
            ``None`` for values.
        page_table: ``int32 [B, pages per sequence]``, or ``None``. Slot ``s`` of sequence ``b`` is in page
            ``page_table[b, s // page size]``.
    """

    data: jax.Array
    scales: jax.Array | None = None
    page_table: jax.Array | None = None

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return self.data.shape[1] if self.page_table is None else self.page_table.shape[0]

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return self.data.shape[2] * (1 if self.page_table is None else self.page_table.shape[1])

    @property
    def layout(self) -> CacheLayout:
        """Static layout of the cache, for the kernels."""
        _, pages, page_size, _ = self.data.shape
        layout = CacheLayout(kind=self.kind, batch_size=self.batch_size, capacity=self.capacity)
        if self.page_table is None:
            return layout
        return dataclasses.replace(layout, page_size=page_size, pool_size=pages * page_size)

    @property
    def kind(self) -> str:
        """Storage of the rows: "int8", "fp8", or "plain" for values."""
        return _QUANTIZED_CACHE_KINDS.get(self.data.dtype.name, "plain")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["acc", "row_max", "row_sum", "positions"],
    meta_fields=["capacity", "block_size"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class SplitKVPartials:
    """Partial attention over splits of the cached rows. A short sequence fills only the first of its splits.

    Attributes:
        acc: ``float32 [B, splits, T * N, R]``, weighted sums of latents.
        row_max: ``float32 [B, splits, T * N]``, largest scores.
        row_sum: ``float32 [B, splits, T * N]``, sums of exponentials.
        positions: ``int32 [B * T]``, positions of the tokens.
        capacity: Slots of a sequence in the cache.
        block_size: A split is a whole number of blocks of this many rows.
    """

    acc: jax.Array
    row_max: jax.Array
    row_sum: jax.Array
    positions: jax.Array
    capacity: int
    block_size: int
