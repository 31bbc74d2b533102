"""Validation of a :class:`~glm_jax.Config`: types first, then values.

Configs are typed as Any here, because :mod:`glm_jax.config` imports this module.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

_POSITIVE = """vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_rope_head_dim v_head_dim
    intermediate_size moe_intermediate_size n_routed_experts num_experts_per_tok max_position_embeddings n_group
    topk_group""".split()


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float; booleans are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def type_problems(cfg: Any) -> list[str]:
    """Descriptions of all fields whose value does not have the type of the field."""
    problems = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            problems.append(f"{field.name} must be an integer, not {value!r}")
        if field.type == "float" and (not is_number(value) or not 0 < value < math.inf):
            problems.append(f"{field.name} must be a positive number, not {value!r}")
        if field.type == "bool" and not isinstance(value, bool):
            problems.append(f"{field.name} must be true or false, not {value!r}")
    kinds = cfg.mlp_layer_types
    if not isinstance(kinds, tuple) or any(kind not in ("dense", "sparse") for kind in kinds):
        problems.append(f"mlp_layer_types must be a tuple of 'dense' and 'sparse', not {cfg.mlp_layer_types!r}")
    if not isinstance(cfg.eos_token_ids, tuple) or any(type(token) is not int for token in cfg.eos_token_ids):
        problems.append(f"eos_token_ids must be a tuple of integers, not {cfg.eos_token_ids!r}")
    if not isinstance(cfg.run_starts, tuple) or any(type(layer) is not int for layer in cfg.run_starts):
        problems.append(f"run_starts must be a tuple of integers, not {cfg.run_starts!r}")
    for name in ("q_lora_rank", "pad_token_id"):
        value = getattr(cfg, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            problems.append(f"{name} must be an integer or null, not {value!r}")
    return problems


def value_problems(cfg: Any) -> list[str]:
    """Descriptions of all values that are out of range or contradict each other."""
    # Pairs of (is valid, message).
    checks = [(getattr(cfg, name) > 0, f"{name} is {getattr(cfg, name)}, must be positive") for name in _POSITIVE]
    checks += [
        (cfg.q_lora_rank is None or cfg.q_lora_rank > 0, f"q_lora_rank is {cfg.q_lora_rank}, must be positive or null"),
        (cfg.qk_nope_head_dim >= 0, f"qk_nope_head_dim is {cfg.qk_nope_head_dim}, must not be negative"),
        (cfg.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {cfg.qk_rope_head_dim}, must be even"),
        (
            len(cfg.mlp_layer_types) == cfg.num_hidden_layers,
            f"mlp_layer_types has {len(cfg.mlp_layer_types)} entries for {cfg.num_hidden_layers} layers",
        ),
        (cfg.n_shared_experts >= 0, f"n_shared_experts is {cfg.n_shared_experts}, must not be negative"),
        (
            cfg.num_nextn_predict_layers in (0, 1),
            f"num_nextn_predict_layers is {cfg.num_nextn_predict_layers}, must be 0 or 1",
        ),
    ]
    if problems := [message for is_valid, message in checks if not is_valid]:
        return problems
    per_group = cfg.n_routed_experts // cfg.n_group
    candidates = per_group * cfg.topk_group
    checks = [
        (
            cfg.n_routed_experts % cfg.n_group == 0,
            f"n_group {cfg.n_group} does not divide n_routed_experts {cfg.n_routed_experts}",
        ),
        (cfg.topk_group <= cfg.n_group, f"topk_group {cfg.topk_group} is more than n_group {cfg.n_group}"),
        (
            cfg.n_group == 1 or per_group >= 2,
            f"n_group {cfg.n_group} leaves {per_group} expert per group, must be two or more",
        ),
        (
            cfg.num_experts_per_tok <= candidates,
            f"num_experts_per_tok {cfg.num_experts_per_tok} is more than the {candidates} experts to choose from",
        ),
        (
            all(0 <= i < cfg.vocab_size for i in cfg.eos_token_ids),
            f"eos_token_id {list(cfg.eos_token_ids)} is outside the vocabulary",
        ),
    ]
    return [message for is_valid, message in checks if not is_valid]
