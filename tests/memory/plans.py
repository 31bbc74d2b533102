"""Configs and plans that the memory tests share."""

from types import SimpleNamespace
from typing import Unpack

from hypothesis import strategies as st

from glm_jax.config import Config
from glm_jax.memory import MemoryPlan, MemoryPlanOptions, default_rules, parse_gpus, plan_memory, plan_memory_on_gpus

FLASH = Config.flash()
SMALL = FLASH.replace(
    vocab_size=400,
    hidden_size=48,
    num_hidden_layers=3,
    mlp_layer_types=("dense", "sparse", "sparse"),
    num_attention_heads=20,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=80,
    moe_intermediate_size=40,
    n_routed_experts=8,
    max_position_embeddings=5000,
    eos_token_ids=(),
    pad_token_id=None,
)
VARIANTS = {
    "flash": FLASH,
    "small": SMALL,
    "no q rank": SMALL.replace(q_lora_rank=None),
    "tied": SMALL.replace(tie_word_embeddings=True),
    "own copies": SMALL.replace(mtp_own_embeddings=True),
    "no prediction layer": SMALL.replace(num_nextn_predict_layers=0),
    "no shared expert": SMALL.replace(n_shared_experts=0),
    "two shared experts": SMALL.replace(n_shared_experts=2),
    "all dense": SMALL.replace(mlp_layer_types=("dense",) * 3),
    "dense in between": SMALL.replace(mlp_layer_types=("sparse", "dense", "sparse")),
}
LARGE = 10**15

VARIANT_CONFIGS = st.sampled_from(list(VARIANTS.values()))
# Configs with numbers of devices. All have 20 heads, but the widths of 1,536 and 10,240 divide over fewer devices.
SPLITS = st.sampled_from(
    [(cfg, n) for cfg in VARIANTS.values() for n in ([1, 2, 4] if cfg is FLASH else [1, 2, 4, 5, 10, 20])]
)
DTYPES = st.sampled_from(["bfloat16", "float32"])
CACHE_DTYPES = st.sampled_from([None, "bfloat16", "float32", "int8", "fp8"])
DEVICE_BYTES = st.one_of(st.integers(0, 10**8), st.integers(10**8, 3 * 10**11))


def plan_on(gpus: str = "h100", **options: Unpack[MemoryPlanOptions]) -> MemoryPlan:
    """Plans the real model on 95 % of the memory of known GPUs."""
    return plan_memory_on_gpus(FLASH, *parse_gpus(gpus), memory_fraction=0.95, **options)


def split_plan(cfg: Config, devices: int, **options) -> MemoryPlan:
    """Plans a model that is split over several devices."""
    return plan_memory(cfg, devices=devices, rules=default_rules(devices), **options)


def fake_device(kind: str = "NVIDIA H100 80GB HBM3", platform: str = "gpu", **stats: int) -> SimpleNamespace:
    """Returns an object with the attributes of a JAX device that a plan reads."""
    return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats or None)
