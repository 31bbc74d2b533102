"""Plans the memory of a model from its config, before any weight is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypedDict, Unpack

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm_jax.cache.latent import bytes_per_token, canonical_cache_dtype
from glm_jax.config import Config
from glm_jax.errors import MemoryPlanError
from glm_jax.memory.devices import (
    Device,
    GpuInfo,
    available_device_memory,
    device_bandwidth,
    uses_default_memory_fraction,
)
from glm_jax.memory.estimates import MTP_LAYER, PlacementSpec, WeightGroup, Workspace, decode_bytes
from glm_jax.memory.memory_model import MemoryModel, MemoryRequirement, resolve_axis_sizes
from glm_jax.memory.oom_message import oom_message
from glm_jax.sharding import MESH_AXES, Rules, get_sharding_preset
from glm_jax.weights import QuantRules
from glm_jax.weights.storage import Storage, plan_storage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory that a model needs, and the limits that follow; :func:`plan_memory` builds one.

    Attributes:
        fits: Whether ``sequences`` sequences of ``context`` tokens fit.
        devices: Number of devices.
        device_bytes: Usable bytes on each device.
        context: Planned tokens per sequence, prompt and completion together.
        sequences: Planned number of concurrent sequences.
        requirement: Bytes on each device for this number of sequences and tokens.
        workspace: Parts of the workspace at this context. ``requirement.workspace`` is larger where a shorter sequence
            would need more.
        weight_groups: Weights by group, such as attention or routed experts.
        cache_bytes_per_token: Bytes of one token of one sequence in the cache of all layers.
        max_context: Longest context of a single sequence that fits; 0 if the weights alone do not fit.
        max_sequences: Largest number of sequences of ``context`` tokens that fit.
        bandwidth: Memory bandwidth of each device in bytes per second, ``None`` if unknown.
        decode_bytes: Bytes that each device must read to decode one token of every sequence.
        memory_model: Model that the plan was computed from; it answers for other numbers of sequences and tokens.
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
        """Number of parameters without the prediction layer."""
        return sum(group.parameters for name, group in self.weight_groups.items() if name != MTP_LAYER)

    @property
    def parameters_on_disk(self) -> int:
        """Number of parameters in the original checkpoint.

        It includes the prediction layer with its own copies of embedding and head.
        """
        cfg, layer = self.memory_model.cfg, self.weight_groups[MTP_LAYER].parameters
        copies = 2 if cfg.num_nextn_predict_layers and not cfg.mtp_own_embeddings else 0
        return self.parameters + layer + copies * cfg.vocab_size * cfg.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model without the prediction layer."""
        return sum(group.nbytes for name, group in self.weight_groups.items() if name != MTP_LAYER)

    @property
    def mtp_bytes(self) -> int:
        """Bytes of the whole prediction layer, without the weights that it shares with the model."""
        return self.weight_groups[MTP_LAYER].nbytes

    @property
    def bound_tokens_per_s(self) -> float | None:
        """Upper bound on decoded tokens per second of all sequences together, ``None`` if the bandwidth is unknown.

        The bound is the bandwidth over the bytes that a decode step must read. It is not a measurement: computation,
        launches and sampling come on top. For more than one sequence it assumes uniform routing.
        """
        return None if self.bandwidth is None else self.sequences * self.bandwidth / self.decode_bytes

    def require_fits(self) -> Self:
        """Returns the plan itself if it fits.

        Raises:
            MemoryPlanError: if it does not; the message shows the arithmetic and alternatives that fit.
        """
        if not self.fits:
            raise MemoryPlanError(self.oom_message())
        return self

    def oom_message(self) -> str:
        """Returns why the planned sequences do not fit, and alternatives that do."""
        return oom_message(self.memory_model, self.sequences, self.context)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        fields = """fits devices device_bytes context sequences cache_bytes_per_token max_context max_sequences
            bandwidth decode_bytes""".split()
        derived = "parameters parameters_on_disk weight_bytes mtp_bytes bound_tokens_per_s".split()
        return {
            **{name: getattr(self, name) for name in [*fields, *derived]},
            "dtype": self.memory_model.placement.dtype,
            "cache_dtype": self.memory_model.placement.cache_dtype,
            "mtp_loaded": self.memory_model.mtp,
            "device_needs": {**self.requirement._asdict(), "total": self.requirement.total},
            "parts": {name: dataclasses.asdict(group) for name, group in self.weight_groups.items()},
        }


class MemoryPlanOptions(TypedDict, total=False):
    """Arguments of :func:`plan_memory` that do not depend on the devices."""

    dtype: DTypeLike
    storage: Storage
    cache_dtype: DTypeLike | None
    rules: Rules
    context: int | None
    sequences: int
    mtp: bool


def plan_memory(
    cfg: Config,
    *,
    device_bytes: int,
    dtype: DTypeLike = "bfloat16",
    storage: Storage = Storage(),
    cache_dtype: DTypeLike | None = None,
    devices: int | Mapping[str, int] = 1,
    rules: Rules = Rules(),
    context: int | None = None,
    sequences: int = 1,
    bandwidth: int | None = None,
    mtp: bool = True,
    on_cpu: bool = False,
    default_memory_fraction: bool = False,
) -> MemoryPlan:
    """Plans the memory of a model from its config.

    Args:
        cfg: Config of the model.
        device_bytes: Usable bytes on each device.
        dtype: Dtype of the weights that are not quantized.
        storage: Storage of the quantized weights; :func:`resolve_storage` builds one from a preset.
        cache_dtype: Dtype of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`; ``dtype`` by default.
        devices: Number of devices along the mesh axis "model", or the number along each mesh axis.
        rules: Mesh axis of each logical axis.
        context: Tokens per sequence, prompt and completion together; the longest that fits by default.
        sequences: Number of concurrent sequences. A running batch is padded to a power of two: pass that number.
        bandwidth: Memory bandwidth of each device in bytes per second, for the bound on decoding.
        mtp: Whether the prediction layer is loaded too.
        on_cpu: Whether the devices are CPUs.
        default_memory_fraction: Whether ``device_bytes`` is JAX's default share of a GPU. If so, the message of a plan
            that does not fit says how to get more.

    Raises:
        MemoryPlanError: if a number is out of range. A plan that does not fit raises only in
            :meth:`MemoryPlan.require_fits`.
        ShardingError: if the model cannot be split over these devices.
    """
    _validate_request(cfg, context, sequences)
    dtype_name = jnp.dtype(dtype).name
    placement = PlacementSpec(
        dtype=dtype_name,
        storage=storage,
        cache_dtype=canonical_cache_dtype(dtype_name if cache_dtype is None else cache_dtype),
        rules=rules,
        axis_sizes=resolve_axis_sizes(cfg, rules, devices),
        on_cpu=on_cpu,
    )
    model = MemoryModel(
        cfg=cfg,
        placement=placement,
        device_bytes=device_bytes,
        mtp=mtp,
        default_memory_fraction=default_memory_fraction,
    )
    context = max(1, model.max_context(sequences)) if context is None else context
    return MemoryPlan(
        fits=model.fits(sequences, context),
        devices=model.num_devices,
        device_bytes=device_bytes,
        context=context,
        sequences=sequences,
        requirement=model.requirement(sequences, context),
        workspace=model.workspace(sequences, context),
        weight_groups=dict(model.weight_groups),
        cache_bytes_per_token=bytes_per_token(cfg, placement.cache_dtype),
        max_context=model.max_context(1),
        max_sequences=model.max_sequences(context),
        bandwidth=bandwidth,
        decode_bytes=decode_bytes(cfg, placement, model.weight_groups, sequences, context),
        memory_model=model,
    )


def plan_memory_on_devices(
    cfg: Config, devices: Mesh | Sequence[Device], **options: Unpack[MemoryPlanOptions]
) -> MemoryPlan:
    """Plans the memory of a model on local devices and the memory that is free on them now: call it before loading.

    Args:
        cfg: Config of the model.
        devices: A mesh, or devices that would form its axis "model".
        options: Further arguments of :func:`plan_memory`.
    """
    local = list(devices.devices.flat) if isinstance(devices, Mesh) else list(devices)
    on_cpu = local[0].platform == "cpu"
    free = min(available_device_memory(device) for device in local)
    return plan_memory(
        cfg,
        # CPU devices share the machine's memory.
        device_bytes=free // len(local) if on_cpu else free,
        devices=dict(devices.shape) if isinstance(devices, Mesh) else len(local),
        bandwidth=device_bandwidth(local[0]),
        on_cpu=on_cpu,
        default_memory_fraction=uses_default_memory_fraction(local[0]),
        **options,
    )


def plan_memory_on_gpus(
    cfg: Config, gpu: GpuInfo, count: int = 1, *, memory_fraction: float = 1.0, **options: Unpack[MemoryPlanOptions]
) -> MemoryPlan:
    """Plans the memory of a model on known GPUs, which need not be present.

    Args:
        cfg: Config of the model.
        gpu: Kind of GPU.
        count: Number of GPUs, which form the mesh axis "model".
        memory_fraction: Usable fraction of each GPU's memory.
        options: Further arguments of :func:`plan_memory`; ``rules`` is :func:`default_rules` unless it is among them.
    """
    options.setdefault("rules", default_rules(count))
    device_bytes = int(gpu.memory_bytes * memory_fraction)
    return plan_memory(cfg, device_bytes=device_bytes, devices=count, bandwidth=gpu.bandwidth, **options)


def default_rules(num_devices: int) -> Rules:
    """Returns the sharding of a model on one device (replicated) or several (preset "latency")."""
    return get_sharding_preset("latency" if num_devices > 1 else "replicated")


def resolve_storage(cfg: Config, stored: Storage, quantize: str | None, num_devices: int = 1) -> Storage:
    """Returns the storage that the weights will have once loaded.

    Args:
        cfg: Config of the model.
        stored: Storage of the weights in their source.
        quantize: Quantization preset that is applied while loading, ``None`` to keep ``stored``.
        num_devices: Number of devices that the model is split over by :func:`default_rules`.

    Raises:
        GlmError: if there is no such preset.
    """
    quant = QuantRules.resolve(quantize)
    if quant is None:
        return stored
    return plan_storage(cfg, quant, default_rules(num_devices), {MESH_AXES[1]: num_devices})[0]


def _validate_request(cfg: Config, context: int | None, sequences: int) -> None:
    longest = cfg.max_position_embeddings
    if sequences < 1:
        raise MemoryPlanError(f"sequences must be at least 1, not {sequences}")
    if context is not None and not 1 <= context <= longest:
        raise MemoryPlanError(f"context must be 1 to {longest:,}, the model's longest, not {context:,}")
