"""Memory: what a model needs on its devices, planned before anything is loaded."""

from glm_jax.memory.devices import Gpu, bandwidth_of, device_limit, find_gpus, gpus
from glm_jax.memory.estimates import PREDICTION_LAYER, PREFILL_CHUNK, Part, Workspace, chunk_length, distinct_experts
from glm_jax.memory.memory_model import Need, Setup
from glm_jax.memory.oom_message import counted, in_gb
from glm_jax.memory.planner import MemoryPlan, plan, plan_on

__all__ = [
    "PREDICTION_LAYER",
    "PREFILL_CHUNK",
    "Gpu",
    "MemoryPlan",
    "Need",
    "Part",
    "Setup",
    "Workspace",
    "bandwidth_of",
    "chunk_length",
    "counted",
    "device_limit",
    "distinct_experts",
    "find_gpus",
    "gpus",
    "in_gb",
    "plan",
    "plan_on",
]
