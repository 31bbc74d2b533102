"""The latent cache: what attention keeps of the past, 576 values per token and layer for GLM-4.7-Flash.

Keys and values are never stored expanded. A slot holds the latent after its norm and the rotated rope key (one for all
heads), as ``[latent | rope]``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from glm_jax.config import Config
from glm_jax.sharding import LogicalAxis, Rules

AXES: tuple[LogicalAxis | None, ...] = (None, "batch", None, None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class LatentCache:
    """Contiguous cache: the slot of a token is its position.

    A query at position ``t`` sees slots ``s <= t``, so a row needs no length and slots past the last written one may
    hold anything.

    Attributes:
        data: ``[L, B, S, R + P]``, layers, rows, slots, latent and rope widths.
    """

    data: jax.Array

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.data.shape[2]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.data.shape[1]

    @classmethod
    def create(
        cls,
        cfg: Config,
        batch: int,
        capacity: int,
        dtype: Any = jnp.bfloat16,
        *,
        layers: int | None = None,
        rules: Rules = Rules(),
        mesh: Mesh | None = None,
    ) -> LatentCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` tokens; ``layers`` is the model's unless given."""
        shape = (cfg.num_hidden_layers if layers is None else layers, batch, capacity, cfg.cache_width)
        sharding = None if mesh is None else NamedSharding(mesh, rules.spec(*AXES))
        return cls(jnp.zeros(shape, dtype, device=sharding))


def bytes_per_token(cfg: Config, dtype: Any = jnp.bfloat16, layers: int | None = None) -> int:
    """Bytes that one token keeps in all layers (54,144 for GLM-4.7-Flash in bf16)."""
    return (cfg.num_hidden_layers if layers is None else layers) * cfg.cache_width * jnp.dtype(dtype).itemsize
