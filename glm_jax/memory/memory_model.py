"""Decides whether a number of sequences of some length fits on the devices, and finds the largest that does."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self, cast

from jax.sharding import AbstractMesh, Mesh

from glm_jax.cache.latent import QUANTIZED_CACHE_MAX
from glm_jax.config import Config
from glm_jax.errors import MemoryPlanError, ShardingError
from glm_jax.memory.estimates import (
    MTP_LAYER,
    PlacementSpec,
    WeightGroup,
    Workspace,
    cache_bytes,
    estimate_workspace,
    group_weights,
)
from glm_jax.ops.mla import KEY_BLOCK
from glm_jax.sharding import MESH_AXES, Rules, get_sharding_preset
from glm_jax.weights import QUANT_PRESETS
from glm_jax.weights.storage import plan_storage


class MemoryRequirement(NamedTuple):
    """Bytes that one device needs.

    Attributes:
        weights: Bytes of the parameters.
        cache: Bytes of the latent cache.
        workspace: Bytes of activations and other temporaries.
    """

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of all bytes on the device."""
        return sum(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Memory use of a model on given devices as a function of the number and length of the sequences.

    Attributes:
        cfg: Config of the model.
        placement: Dtypes and sharding.
        device_bytes: Usable bytes on each device.
        mtp: Whether the prediction layer is loaded too.
        default_memory_fraction: Whether ``device_bytes`` is the 75 % of a GPU that JAX takes by default.
    """

    cfg: Config
    placement: PlacementSpec
    device_bytes: int
    mtp: bool = True
    default_memory_fraction: bool = False

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return math.prod(size for _, size in self.placement.axis_sizes)

    @property
    def weight_groups(self) -> Mapping[str, WeightGroup]:
        """Weights by group, such as attention or routed experts."""
        return _cached_weight_groups(self.cfg, self.placement)

    def requirement(self, sequences: int, context: int) -> MemoryRequirement:
        """Returns the bytes per device for ``sequences`` sequences of up to ``context`` tokens.

        The total never decreases as either argument grows.
        """
        weights = sum(group.device_bytes for name, group in self.weight_groups.items() if self.mtp or name != MTP_LAYER)
        cache = cache_bytes(self.cfg, self.placement, sequences, context)
        # Attention reads up to this many slots in one block, so a shorter sequence may need the larger workspace.
        short = min(context, 2 * KEY_BLOCK)
        unused_cache = cache - cache_bytes(self.cfg, self.placement, sequences, short)
        workspace = max(self.workspace(sequences, context).total, self.workspace(sequences, short).total - unused_cache)
        return MemoryRequirement(weights, cache, workspace)

    def workspace(self, sequences: int, context: int) -> Workspace:
        """Returns the bytes needed besides weights and cache."""
        return estimate_workspace(self.cfg, self.placement, sequences, context)

    def fits(self, sequences: int, context: int) -> bool:
        """Returns whether ``sequences`` sequences of ``context`` tokens fit."""
        return self.requirement(sequences, context).total <= self.device_bytes

    def max_context(self, sequences: int) -> int:
        """Returns the longest context that fits ``sequences`` times and that the model supports; 0 if none does."""
        return _largest_fitting(lambda context: self.fits(sequences, context), self.cfg.max_position_embeddings)

    def max_sequences(self, context: int) -> int:
        """Returns the largest number of sequences of ``context`` tokens that fit; 0 if not even one does."""
        return _largest_fitting(lambda sequences: self.fits(sequences, context))

    def with_devices(self, count: int) -> Self | None:
        """Returns this model split over ``count`` such devices, ``None`` if its dimensions do not divide."""
        rules = get_sharding_preset("latency")
        try:
            sizes = resolve_axis_sizes(self.cfg, rules, count)
        except ShardingError:
            return None
        return self._with_placement(rules=rules, axis_sizes=sizes)

    def with_dtype(self, dtype: str) -> Self:
        """Returns this model with another dtype of weights and cache; a cache in 8 bits stays as it is."""
        cache_dtype = self.placement.cache_dtype
        return self._with_placement(
            dtype=dtype, cache_dtype=cache_dtype if cache_dtype in QUANTIZED_CACHE_MAX else dtype
        )

    def with_quantization(self, preset: str) -> Self:
        """Returns this model with its weights quantized by a preset of :data:`glm_jax.weights.QUANT_PRESETS`."""
        sizes = dict(self.placement.axis_sizes)
        storage, _ = plan_storage(self.cfg, QUANT_PRESETS[preset], self.placement.rules, sizes)
        return self._with_placement(storage=storage)

    def with_cache_dtype(self, dtype: str) -> Self:
        """Returns this model with another cache dtype."""
        return self._with_placement(cache_dtype=dtype)

    def _with_placement(self, **changes: object) -> Self:
        return dataclasses.replace(self, placement=dataclasses.replace(self.placement, **changes))


def resolve_axis_sizes(cfg: Config, rules: Rules, devices: int | Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Returns the number of devices along each mesh axis; a plain number puts all devices on the axis "model".

    Raises:
        MemoryPlanError: if there is no device.
        ShardingError: if the model cannot be split over these devices.
    """
    sizes = dict(zip(MESH_AXES, (1, devices), strict=True)) if isinstance(devices, int) else dict(devices)
    if any(size < 1 for size in sizes.values()):
        raise MemoryPlanError(f"there must be at least one device, not {devices}")
    # Validation reads only the axes, so an abstract mesh without devices is enough.
    rules.validate(cfg, cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes))))
    return tuple(sizes.items())


@functools.lru_cache(maxsize=64)
def _cached_weight_groups(cfg: Config, placement: PlacementSpec) -> dict[str, WeightGroup]:
    return group_weights(cfg, placement)


def _largest_fitting(fits: Callable[[int], bool], maximum: int | None = None) -> int:
    """Returns the largest number from 1 to ``maximum`` that fits, 0 if none; ``fits`` must be monotonic."""
    low, high = 0, 1
    while fits(high):
        if high == maximum:
            return high
        low, high = high, 2 * high if maximum is None else min(2 * high, maximum)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
