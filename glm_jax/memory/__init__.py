"""Memory: what a model needs on its devices, planned before anything is loaded."""

from glm_jax.memory.devices import GpuInfo, available_device_memory, device_bandwidth, known_gpus, parse_gpus
from glm_jax.memory.estimates import (
    MTP_LAYER,
    PREFILL_CHUNK_SIZE,
    WeightGroup,
    Workspace,
    expected_active_experts,
    prefill_chunk_length,
)
from glm_jax.memory.memory_model import MemoryModel, MemoryRequirement
from glm_jax.memory.oom_message import format_bytes, pluralize
from glm_jax.memory.planner import MemoryPlan, plan_memory, plan_memory_on_devices

__all__ = [
    "MTP_LAYER",
    "PREFILL_CHUNK_SIZE",
    "GpuInfo",
    "MemoryModel",
    "MemoryPlan",
    "MemoryRequirement",
    "WeightGroup",
    "Workspace",
    "available_device_memory",
    "device_bandwidth",
    "expected_active_experts",
    "format_bytes",
    "known_gpus",
    "parse_gpus",
    "plan_memory",
    "plan_memory_on_devices",
    "pluralize",
    "prefill_chunk_length",
]
