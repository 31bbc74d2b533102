"""The plan of a model's memory, made from its config before any byte is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp
from jax.sharding import Mesh

from glm_jax.cache.latent import bytes_per_token, canonical_cache_dtype
from glm_jax.config import Config
from glm_jax.errors import MemoryPlanError
from glm_jax.memory import devices as hardware
from glm_jax.memory.estimates import MTP_LAYER, PlacementSpec, WeightGroup, Workspace, decode_bytes
from glm_jax.memory.memory_model import MemoryModel, MemoryRequirement, resolve_axis_sizes
from glm_jax.memory.oom_message import oom_message
from glm_jax.sharding import Rules
from glm_jax.weights.storage import Storage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a model needs and what fits; make one with :func:`plan_memory`.

    Attributes:
        fits: whether ``sequences`` rows of ``context`` tokens fit.
        devices: their number.
        device_bytes: bytes that may be used on each.
        context: planned tokens per row, prompt and completion together.
        sequences: planned rows.
        requirement: bytes on each device for these.
        workspace: its parts at this context (``requirement`` has more where a shorter row would need more).
        weight_groups: the weights by part.
        cache_bytes_per_token: of one row, in all layers.
        max_context: the longest context of one row that fits; 0 if the weights alone do not.
        max_sequences: the most rows of ``context`` tokens that fit.
        bandwidth: of each device's memory in bytes per second, if known.
        decode_bytes: what each device must read to write one token in every row.
        memory_model: what was planned; answers for other numbers of rows and tokens.
    """

    fits: bool
    devices: int
    device_bytes: int
    context: int
    sequences: int
    requirement: MemoryRequirement
    workspace: Workspace
    weight_groups: Mapping[str, WeightGroup]
    cache_bytes_per_token: int
    max_context: int
    max_sequences: int
    bandwidth: int | None
    decode_bytes: int
    memory_model: MemoryModel = dataclasses.field(repr=False)

    @property
    def parameters(self) -> int:
        """Of the model without its prediction layer."""
        return sum(part.parameters for name, part in self.weight_groups.items() if name != MTP_LAYER)

    @property
    def parameters_on_disk(self) -> int:
        """As the original stores them: with the prediction layer and its copies of embedding and head."""
        cfg, layer = self.memory_model.cfg, self.weight_groups[MTP_LAYER].parameters
        copies = 2 if cfg.num_nextn_predict_layers and not cfg.mtp_own_embeddings else 0
        return self.parameters + layer + copies * cfg.vocab_size * cfg.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Of the whole model without its prediction layer, in the dtypes it is held in."""
        return sum(part.nbytes for name, part in self.weight_groups.items() if name != MTP_LAYER)

    @property
    def mtp_bytes(self) -> int:
        """Of the whole prediction layer, without what it shares with the model."""
        return self.weight_groups[MTP_LAYER].nbytes

    @property
    def bound_tokens_per_s(self) -> float | None:
        """Bandwidth over the bytes that a decode step must read: a bound on the tokens of all rows together.

        Not a measurement: kernels, launches and sampling come on top. For more than one row it assumes that routing is
        uniform. None if the bandwidth is not known.
        """
        return None if self.bandwidth is None else self.sequences * self.bandwidth / self.decode_bytes

    def require_fits(self) -> Self:
        """The plan itself if it fits.

        Raises:
            MemoryPlanError: with the arithmetic, and with what would fit.
        """
        if not self.fits:
            raise MemoryPlanError(self.oom_message())
        return self

    def oom_message(self) -> str:
        """Why the planned rows do not fit, and what would."""
        return oom_message(self.memory_model, self.sequences, self.context)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain numbers and names."""
        derived = "parameters parameters_on_disk weight_bytes mtp_bytes bound_tokens_per_s".split()
        kept = """fits devices device_bytes context sequences cache_bytes_per_token max_context max_sequences bandwidth
            decode_bytes""".split()
        return {
            **{name: getattr(self, name) for name in [*kept, *derived]},
            "dtype": self.memory_model.placement.dtype,
            "cache_dtype": self.memory_model.placement.cache_dtype,
            "mtp_loaded": self.memory_model.mtp,
            "device_needs": {**self.requirement._asdict(), "total": self.requirement.total},
            "parts": {name: dataclasses.asdict(part) for name, part in self.weight_groups.items()},
        }


def plan_memory(
    cfg: Config,
    *,
    device_bytes: int,
    dtype: Any = "bfloat16",
    storage: Storage = Storage(),
    cache_dtype: Any = None,
    devices: int | Mapping[str, int] = 1,
    rules: Rules = Rules(),
    context: int | None = None,
    sequences: int = 1,
    bandwidth: int | None = None,
    mtp: bool = True,
    on_cpu: bool = False,
    default_memory_fraction: bool = False,
) -> MemoryPlan:
    """Plans a model's memory from its config.

    Args:
        cfg: the model.
        device_bytes: bytes that may be used on each device.
        dtype: of the weights that are not quantized.
        storage: the quantized weights (:func:`glm_jax.weights.storage.plan_storage` makes one of rules).
        cache_dtype: of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`; ``dtype`` unless given.
        devices: number along the mesh axis "model", or the number along each axis.
        rules: mesh axis of each logical axis.
        context: tokens per row, prompt and completion together; the longest that fits unless given.
        sequences: rows at once. A running batch is padded to a power of two: give that number.
        bandwidth: of each device's memory in bytes per second, for the bound on decoding.
        mtp: the prediction layer is loaded too.
        on_cpu: the devices are CPUs.
        default_memory_fraction: ``device_bytes`` is JAX's default share of a GPU; a refusal then says how to get more.

    Raises:
        MemoryPlanError: if a number is impossible; not if the model does not fit (see :meth:`MemoryPlan.require_fits`).
        ShardingError: if the model cannot be split over that many devices.
    """
    _validate_request(cfg, context, sequences)
    kind = jnp.dtype(dtype).name
    placement = PlacementSpec(
        dtype=kind,
        storage=storage,
        cache_dtype=canonical_cache_dtype(kind if cache_dtype is None else cache_dtype),
        rules=rules,
        axis_sizes=resolve_axis_sizes(cfg, rules, devices),
        on_cpu=on_cpu,
    )
    setup = MemoryModel(
        cfg=cfg,
        placement=placement,
        device_bytes=device_bytes,
        mtp=mtp,
        default_memory_fraction=default_memory_fraction,
    )
    context = max(1, setup.max_context(sequences)) if context is None else context
    return MemoryPlan(
        fits=setup.fits(sequences, context),
        devices=setup.num_devices,
        device_bytes=device_bytes,
        context=context,
        sequences=sequences,
        requirement=setup.requirement(sequences, context),
        workspace=setup.workspace(sequences, context),
        weight_groups=dict(setup.weight_groups),
        cache_bytes_per_token=bytes_per_token(cfg, placement.cache_dtype),
        max_context=setup.max_context(1),
        max_sequences=setup.max_sequences(context),
        bandwidth=bandwidth,
        decode_bytes=decode_bytes(cfg, placement, setup.weight_groups, sequences, context),
        memory_model=setup,
    )


def plan_memory_on_devices(cfg: Config, devices: Mesh | Sequence[hardware.Device], **options: Any) -> MemoryPlan:
    """Like :func:`plan_memory`, for devices at hand and what is free on them now: call it before loading.

    Args:
        cfg: the model.
        devices: a mesh, or devices that would stand along its axis "model".
        options: ``dtype, storage, cache_dtype, rules, context, sequences, mtp`` of :func:`plan_memory`.
    """
    present = list(devices.devices.flat) if isinstance(devices, Mesh) else list(devices)
    on_cpu = present[0].platform == "cpu"
    free = min(hardware.available_device_memory(device) for device in present)
    return plan_memory(
        cfg,
        # CPU devices share the machine's memory.
        device_bytes=free // len(present) if on_cpu else free,
        devices=dict(devices.shape) if isinstance(devices, Mesh) else len(present),
        bandwidth=hardware.device_bandwidth(present[0]),
        on_cpu=on_cpu,
        default_memory_fraction=hardware.uses_default_memory_fraction(present[0]),
        **options,
    )


def _validate_request(cfg: Config, context: int | None, sequences: int) -> None:
    most = cfg.max_position_embeddings
    if sequences < 1:
        raise MemoryPlanError(f"sequences must be at least 1, not {sequences}")
    if context is not None and not 1 <= context <= most:
        raise MemoryPlanError(f"context must be 1 to {most:,}, the model's longest, not {context:,}")
