"""The spellings of the model's config.json that exist, at the real size and at small odd sizes."""

from collections.abc import Mapping
from typing import Any

HfConfig = dict[str, Any]

# Every key of the original checkpoint's config.json.
FLASH_ORIGINAL: HfConfig = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.0rc0",
    "v_head_dim": 256,
    "vocab_size": 154880,
}

# Heads, head widths, ranks and widths all differ, so that no two can be confused.
ODD_SIZES: HfConfig = {
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 52,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 22,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "rope_theta": 10007.0,
    "eos_token_id": [2, 7],
    "pad_token_id": 2,
}


def original_config(**changes: Any) -> HfConfig:
    """Returns the config as the original checkpoint spells it, with changed values."""
    return {**FLASH_ORIGINAL, **changes}


def resaved_config(**changes: Any) -> HfConfig:
    """Returns the config as transformers 5 saves the original: RoPE keys move, and old keys survive as extras."""
    config = original_config(**changes)
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta"), "partial_rotary_factor": 1.0}
    del config["rope_scaling"]
    kinds = ["dense"] * config["first_k_dense_replace"]
    kinds += ["sparse"] * (config["num_hidden_layers"] - len(kinds))
    added = {
        "rope_parameters": rope,
        "rope_interleave": True,
        "mlp_layer_types": kinds,
        "qk_head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "bos_token_id": 0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    return config | added | {key: value for key, value in changes.items() if key in added}


def from_scratch_config(**changes: Any) -> HfConfig:
    """Returns the config as transformers 5 saves one of its own, without the original's extra keys."""
    config = resaved_config(**changes)
    for key in ("first_k_dense_replace", "num_nextn_predict_layers", "partial_rotary_factor", "topk_method"):
        config.pop(key, None)
    return {**config, "output_router_logits": False, "transformers_version": "5.23.0"}


def odd_size_config(**changes: Any) -> HfConfig:
    """Returns the original spelling at `ODD_SIZES`."""
    return original_config(**{**ODD_SIZES, **changes})


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """Returns the kinds of the main layers, then "mtp" if there is a prediction layer."""
    dense = config.get("first_k_dense_replace", 1)
    kinds = config.get("mlp_layer_types") or ["dense"] * dense + ["sparse"] * (config["num_hidden_layers"] - dense)
    return [*kinds, *["mtp"] * config.get("num_nextn_predict_layers", 0)]
