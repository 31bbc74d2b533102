"""The latent cache of multi-head latent attention: 576 values per token and layer for GLM-4.7-Flash.

Keys and values are never stored expanded. A slot holds one *row* ``[latent | rope]``: the latent after its norm, and
the rotated rope key that all heads share. Rows are stored unrounded, in bfloat16 or float32, or in 8 bits.

In 8 bits a row has two scales, because its two parts have different ranges: the latent has just been normed, the rope
key has not. With ``m`` the largest magnitude of a part::

    int8   scale = m / 127    code = round(value / scale), -127 to 127    error <= scale / 2
    fp8    scale = m / 448    code = e4m3(value / scale)                  error <= max(|value| / 16, scale / 1024)

Both round ties to even. The stored row depends on its own values alone: the same token gives the same row in a batch
or alone, in a prompt or in a decode step. Scales are float32: 8 bytes beside 576 codes. 16-bit scales would save 4 of
584 bytes, and would have to be rounded up themselves. A part with a NaN or an infinity reads as NaN throughout, so that
damage is noticed; a part below 127 (or 448) times the smallest normal float32 reads as zeros.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from glm_jax.config import Config
from glm_jax.errors import ConfigError
from glm_jax.sharding import LogicalAxis, Rules

CACHE_AXES: tuple[LogicalAxis | None, ...] = (None, "batch", None, None)  # logical axes of data and scales
CACHE_DTYPES = ("bfloat16", "float32", "int8", "fp8")
QUANTIZED_CACHE_MAX = {"int8": 127.0, "fp8": 448.0}  # largest code of each 8-bit dtype
_SCALES_PER_SLOT = 2  # one for the latent, one for the rope key
# XLA:CPU would convert a whole float8 cache to read or write one row; it leaves integers alone.
_STORAGE_DTYPES = {"fp8": jnp.uint8}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["dequant_dtype"])
@dataclasses.dataclass(frozen=True, slots=True)
class LayerCache:
    """The stored rows of one layer.

    Attributes:
        codes: ``[B, S, R + P]``: values in bfloat16 or float32, int8 codes, or bit patterns of fp8 codes as uint8.
        scales: ``float32 [B, S, 2]``, scales of latents and rope keys; None where the codes are the values.
        dequant_dtype: Dtype that 8-bit rows are read as, by default that of the activations.
    """

    codes: jax.Array
    scales: jax.Array | None = None
    dequant_dtype: str | None = None

    @property
    def num_slots(self) -> int:
        """Slots per row of the batch."""
        return self.codes.shape[1]

    def slice_slots(self, first: jax.Array | int, slots: int) -> LayerCache:
        """``slots`` consecutive slots from ``first`` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, slots, axis=1), self)

    def pad_slots(self, slots: int) -> LayerCache:
        """The rows padded with zeros on the right, to ``slots`` slots in all."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, slots - x.shape[1]), (0, 0))), self)

    def dequantize(self, latent: int, dtype: DTypeLike) -> jax.Array:
        """The values ``[B, S, R + P]``.

        Args:
            latent: R, the width of the latent.
            dtype: Dtype of dequantized 8-bit rows without ``dequant_dtype``; other rows keep their stored dtype.
        """
        if self.scales is None:
            return self.codes
        codes = self.codes
        if codes.dtype == jnp.uint8:
            codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
        values = codes.astype(jnp.float32) * _expand_scales(self.scales, latent, codes.shape[-1])
        return values.astype(self.dequant_dtype or dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "scales"], meta_fields=["dequant_dtype"])
@dataclasses.dataclass(frozen=True, slots=True)
class LatentCache:
    """Contiguous cache: the slot of a token is its position.

    A query at position ``t`` sees slots ``s <= t``. So a sequence needs no length, and slots past the last written one
    may hold anything.

    Attributes:
        data: ``[L, B, S, R + P]``: bfloat16 or float32 values, int8 codes, or bit patterns of float8_e4m3fn codes as
            uint8.
        scales: ``float32 [L, B, S, 2]``, scales of 8-bit codes, else None.
        dequant_dtype: Dtype that attention reads 8-bit rows as, by default that of the activations.
    """

    data: jax.Array
    scales: jax.Array | None = None
    dequant_dtype: str | None = None

    @property
    def capacity(self) -> int:
        """Slots per row of the batch."""
        return self.data.shape[2]

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.data.shape[1]

    @property
    def cache_dtype(self) -> str:
        """Name of the stored dtype, one of :data:`CACHE_DTYPES`."""
        name = self.data.dtype.name
        return next((kind for kind, stored in _STORAGE_DTYPES.items() if jnp.dtype(stored).name == name), name)

    @classmethod
    def create(
        cls,
        cfg: Config,
        batch: int,
        capacity: int,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        layers: int | None = None,
        rules: Rules = Rules(),
        mesh: Mesh | None = None,
        dequant_dtype: str | None = None,
    ) -> LatentCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` tokens.

        Args:
            cfg: Config of the model.
            batch: Rows of the batch.
            capacity: Slots per row.
            dtype: One of :data:`CACHE_DTYPES`.
            layers: Number of layers, by default that of the model.
            rules: Mesh axis of each logical axis.
            mesh: Devices of the cache, by default JAX's default device.
            dequant_dtype: Dtype that attention reads 8-bit rows as, by default that of the activations.

        Raises:
            ConfigError: For any other dtype.
        """
        kind = canonical_cache_dtype(dtype)
        slots = (cfg.num_hidden_layers if layers is None else layers, batch, capacity)
        sharding = None if mesh is None else NamedSharding(mesh, rules.spec(*CACHE_AXES))
        data = jnp.zeros((*slots, cfg.cache_width), _STORAGE_DTYPES.get(kind, kind), device=sharding)
        if kind not in QUANTIZED_CACHE_MAX:
            return cls(data)
        return cls(data, jnp.zeros((*slots, _SCALES_PER_SLOT), jnp.float32, device=sharding), dequant_dtype)

    def write(self, layer: jax.Array | int, positions: jax.Array, rows: jax.Array, latent: int) -> LatentCache:
        """Writes new rows, rounded to the cache's dtype.

        Rows past the capacity, which padding can be, are dropped.

        Args:
            layer: Index of the layer.
            positions: ``int32 [B, T]``, slots to write to.
            rows: ``[B, T, R + P]``.
            latent: R, the width of the latent.

        Returns:
            The new cache.
        """
        codes, scales = quantize_cache_rows(rows, latent, self.cache_dtype)
        batch = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]

        def put(stored: jax.Array, new: jax.Array) -> jax.Array:
            return stored.at[layer, batch, positions].set(new.astype(stored.dtype), mode="drop")

        new_scales = None if self.scales is None or scales is None else put(self.scales, scales)
        return dataclasses.replace(self, data=put(self.data, codes), scales=new_scales)

    def layer(self, index: jax.Array | int) -> LayerCache:
        """The stored rows of one layer."""

        def pick(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

        return LayerCache(pick(self.data), None if self.scales is None else pick(self.scales), self.dequant_dtype)

    def take(self, rows: np.ndarray) -> LatentCache:
        """A new cache with the rows of the batch at these indices, ``int [n]``."""
        return jax.tree.map(lambda x: x[:, rows], self)

    def check_scales(self) -> None:
        """Checks that scales exist for 8-bit codes only, and have the right shape.

        Raises:
            ConfigError: If not.
        """
        actual = None if self.scales is None else self.scales.shape
        expected = (*self.data.shape[:-1], _SCALES_PER_SLOT) if self.cache_dtype in QUANTIZED_CACHE_MAX else None
        if actual != expected:
            raise ConfigError(
                f"the scales of a cache in {self.cache_dtype} {self.data.shape} must be {expected}, not {actual}"
            )


def quantize_cache_rows(rows: jax.Array, latent: int, cache_dtype: str) -> tuple[jax.Array, jax.Array | None]:
    """Quantizes rows for a cache.

    Args:
        rows: ``[..., R + P]``.
        latent: R, the width of the latent.
        cache_dtype: One of :data:`CACHE_DTYPES`.

    Returns:
        Codes ``[..., R + P]`` and scales ``float32 [..., 2]``; the unchanged rows and None unless the dtype has 8 bits.
    """
    if cache_dtype not in QUANTIZED_CACHE_MAX:
        return rows, None
    largest, values = QUANTIZED_CACHE_MAX[cache_dtype], rows.astype(jnp.float32)
    parts = jnp.split(values, [latent], axis=-1)
    scales = jnp.stack([jnp.max(jnp.abs(part), axis=-1) for part in parts], axis=-1) / largest
    # Not `>=`: a NaN must stay one.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0.0, scales)
    units = values / _expand_scales(jnp.where(scales == 0, 1.0, scales), latent, values.shape[-1])
    units = jnp.clip(units, -largest, largest)
    if cache_dtype == "int8":
        return jnp.round(units).astype(jnp.int8), scales
    return jax.lax.bitcast_convert_type(units.astype(jnp.float8_e4m3fn), jnp.uint8), scales


def _expand_scales(scales: jax.Array, latent: int, width: int) -> jax.Array:
    """Repeats the scales ``[..., 2]`` of latent and rope key to one per value, ``[..., R + P]``."""
    parts = jnp.split(scales, _SCALES_PER_SLOT, axis=-1)
    widths = (latent, width - latent)
    expanded = [jnp.broadcast_to(x, (*x.shape[:-1], n)) for x, n in zip(parts, widths, strict=True)]
    return jnp.concatenate(expanded, axis=-1)


def canonical_cache_dtype(dtype: DTypeLike) -> str:
    """The name in :data:`CACHE_DTYPES` of a cache's dtype, for that name or a JAX dtype.

    Raises:
        ConfigError: If no cache has this dtype.
    """
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = None
    name = "fp8" if name == "float8_e4m3fn" else name
    if name not in CACHE_DTYPES:
        *others, last = CACHE_DTYPES
        raise ConfigError(f"cache_dtype must be {', '.join(others)} or {last}, not {dtype!r}")
    return name


def bytes_per_token_and_layer(cfg: Config, dtype: DTypeLike) -> int:
    """Bytes per token in one layer: 584 for GLM-4.7-Flash in 8 bits, 8 of them scales."""
    kind = canonical_cache_dtype(dtype)
    scales = _SCALES_PER_SLOT * 4 if kind in QUANTIZED_CACHE_MAX else 0
    return cfg.cache_width * jnp.dtype(_STORAGE_DTYPES.get(kind, kind)).itemsize + scales


def bytes_per_token(cfg: Config, dtype: DTypeLike = jnp.bfloat16, layers: int | None = None) -> int:
    """Bytes per token in all layers: for GLM-4.7-Flash 54,144 in bfloat16, 27,448 in int8 and fp8."""
    return (cfg.num_hidden_layers if layers is None else layers) * bytes_per_token_and_layer(cfg, dtype)
