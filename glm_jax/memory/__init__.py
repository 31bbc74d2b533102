"""Memory that a model needs on its devices, planned before anything is loaded.

* ``devices``: memory and bandwidth of local devices and of known GPUs
* ``estimates``: bytes of weights, latent cache and workspace from shapes
* ``memory_model``: whether a number of sequences of some length fits, and the largest that does
* ``planner``: the plan for a model on devices
* ``oom_message``: why a plan does not fit, and alternatives that do
* ``formatting``: bytes and counts in messages
"""

from glm_jax.memory.devices import (
    GpuInfo,
    available_device_memory,
    device_bandwidth,
    find_gpu,
    known_gpus,
    parse_gpus,
    peak_memory,
)
from glm_jax.memory.estimates import (
    MTP_LAYER,
    PREFILL_CHUNK_SIZE,
    WeightGroup,
    Workspace,
    active_weight_bytes,
    decode_bytes,
    expected_active_experts,
    prefill_chunk_length,
)
from glm_jax.memory.formatting import format_bytes, pluralize
from glm_jax.memory.memory_model import MemoryModel, MemoryRequirement
from glm_jax.memory.planner import (
    MemoryPlan,
    MemoryPlanOptions,
    default_rules,
    plan_memory,
    plan_memory_on_devices,
    plan_memory_on_gpus,
    resolve_storage,
)

__all__ = [
    "MTP_LAYER",
    "PREFILL_CHUNK_SIZE",
    "GpuInfo",
    "MemoryModel",
    "MemoryPlan",
    "MemoryPlanOptions",
    "MemoryRequirement",
    "WeightGroup",
    "Workspace",
    "active_weight_bytes",
    "available_device_memory",
    "decode_bytes",
    "default_rules",
    "device_bandwidth",
    "expected_active_experts",
    "find_gpu",
    "format_bytes",
    "known_gpus",
    "parse_gpus",
    "peak_memory",
    "plan_memory",
    "plan_memory_on_devices",
    "plan_memory_on_gpus",
    "pluralize",
    "prefill_chunk_length",
    "resolve_storage",
]
