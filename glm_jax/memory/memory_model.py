"""A model on devices: whether a number of rows of a number of tokens fits, and the largest that does."""

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
    """Bytes on one device."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """A model on devices, before anyone has said how many tokens.

    Attributes:
        cfg: the model.
        placement: dtypes and layout.
        device_bytes: that may be used on each device.
        mtp: whether the prediction layer is loaded too.
        default_memory_fraction: ``device_bytes`` is the 75 % of a GPU that JAX takes when nothing is said.
    """

    cfg: Config
    placement: PlacementSpec
    device_bytes: int
    mtp: bool = True
    default_memory_fraction: bool = False

    @property
    def num_devices(self) -> int:
        """Their number."""
        return math.prod(size for _, size in self.placement.axis_sizes)

    @property
    def weight_groups(self) -> Mapping[str, WeightGroup]:
        """The weights by part."""
        return _cached_weight_groups(self.cfg, self.placement)

    def requirement(self, rows: int, context: int) -> MemoryRequirement:
        """Bytes for ``rows`` rows of up to ``context`` tokens; more of either never needs less."""
        held = sum(part.device_bytes for name, part in self.weight_groups.items() if self.mtp or name != MTP_LAYER)
        cache = cache_bytes(self.cfg, self.placement, rows, context)
        # Up to this many slots attention takes all keys at once, so a shorter row may need the larger workspace.
        short = min(context, 2 * KEY_BLOCK)
        unused = cache - cache_bytes(self.cfg, self.placement, rows, short)
        return MemoryRequirement(
            held, cache, max(self.workspace(rows, context).total, self.workspace(rows, short).total - unused)
        )

    def workspace(self, rows: int, context: int) -> Workspace:
        """Besides weights and cache."""
        return estimate_workspace(self.cfg, self.placement, rows, context)

    def fits(self, rows: int, context: int) -> bool:
        """Whether that many rows of that many tokens fit."""
        return self.requirement(rows, context).total <= self.device_bytes

    def max_context(self, rows: int) -> int:
        """The longest context of ``rows`` rows that fits and that the model knows; 0 if none does."""
        return _largest_fitting(lambda context: self.fits(rows, context), self.cfg.max_position_embeddings)

    def max_sequences(self, context: int) -> int:
        """The most rows of ``context`` tokens that fit; 0 if not even one does."""
        return _largest_fitting(lambda rows: self.fits(rows, context))

    def with_devices(self, count: int) -> Self | None:
        """The same with heads and widths split over ``count`` devices of this size; None where they do not divide."""
        rules = get_sharding_preset("latency")
        try:
            sizes = resolve_axis_sizes(self.cfg, rules, count)
        except ShardingError:
            return None
        placement = dataclasses.replace(self.placement, rules=rules, axis_sizes=sizes)
        return dataclasses.replace(self, placement=placement)

    def with_dtype(self, dtype: str) -> Self:
        """The same with weights, and a cache that is not of 8 bits, in another dtype."""
        kept = self.placement.cache_dtype
        placement = dataclasses.replace(
            self.placement, dtype=dtype, cache_dtype=kept if kept in QUANTIZED_CACHE_MAX else dtype
        )
        return dataclasses.replace(self, placement=placement)

    def with_quantization(self, preset: str) -> Self:
        """The same with the weights quantized by a preset."""
        sizes = dict(self.placement.axis_sizes)
        storage, _ = plan_storage(self.cfg, QUANT_PRESETS[preset], self.placement.rules, sizes)
        return dataclasses.replace(self, placement=dataclasses.replace(self.placement, storage=storage))

    def with_cache_dtype(self, dtype: str) -> Self:
        """The same with a cache in another dtype."""
        return dataclasses.replace(self, placement=dataclasses.replace(self.placement, cache_dtype=dtype))


def resolve_axis_sizes(cfg: Config, rules: Rules, devices: int | Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Devices along each mesh axis, all on "model" if only their number is given.

    Raises:
        MemoryPlanError: for no devices.
        ShardingError: if the model cannot be split like that.
    """
    sizes = dict(zip(MESH_AXES, (1, devices), strict=True)) if isinstance(devices, int) else dict(devices)
    if any(size < 1 for size in sizes.values()):
        raise MemoryPlanError(f"there must be at least one device, not {devices}")
    # Validation looks at the axes alone, so devices that are not there will do.
    rules.validate(cfg, cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes))))
    return tuple(sizes.items())


@functools.lru_cache(maxsize=64)
def _cached_weight_groups(cfg: Config, placement: PlacementSpec) -> dict[str, WeightGroup]:
    return group_weights(cfg, placement)


def _largest_fitting(fits: Callable[[int], bool], maximum: int | None = None) -> int:
    """The largest number from 1 to ``maximum`` that fits, 0 if none; whatever is smaller than what fits must fit."""
    low, high = 0, 1
    while fits(high):
        if high == maximum:
            return high
        low, high = high, 2 * high if maximum is None else min(2 * high, maximum)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
