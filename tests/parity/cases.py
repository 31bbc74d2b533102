"""The checkpoints of the parity tests: one case for each property in which real checkpoints can differ."""

from dataclasses import dataclass, field
from typing import Any

from tests.builders.hf_configs import ODD_SIZES, HfConfig, from_scratch_config, original_config, resaved_config

CONFIG_STYLES = {"original": original_config, "resaved": resaved_config, "scratch": from_scratch_config}


@dataclass(frozen=True, slots=True)
class ParityCase:
    """A checkpoint for transformers to create: `changes` to `ODD_SIZES`, in one of the three spellings."""

    name: str
    config_style: str = "original"
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    router_bias_shift: float = 0.0  # added to every router bias

    @property
    def config(self) -> HfConfig:
        """The config.json that is written beside the weights."""
        return CONFIG_STYLES[self.config_style](**{**ODD_SIZES, **self.changes})


def _case(name: str, spelling: str = "original", biased: float = 0.0, **changes: Any) -> ParityCase:
    return ParityCase(name, spelling, sum(map(ord, name)), changes, biased)


_ALL_AT_ONCE: HfConfig = {
    "n_routed_experts": 12,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "n_shared_experts": 3,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "rope_interleave": False,
    "routed_scaling_factor": 0.7,
    "tie_word_embeddings": True,
}
_FLASH_LIKE: HfConfig = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "num_hidden_layers": 5,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "rope_theta": 1000000,
}

CASES = (
    _case("original"),
    _case("resaved", "resaved"),
    _case("scratch", "scratch"),
    _case("flash_like", **_FLASH_LIKE),
    _case("groups", n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4),
    _case("groups_odd", "resaved", n_routed_experts=15, n_group=5, topk_group=3, num_experts_per_tok=6),
    _case("groups_below_zero", "scratch", -3.0, n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=5),
    _case("pruned", n_routed_experts=48, num_experts_per_tok=4, num_nextn_predict_layers=0),
    _case("two_shared", "resaved", n_shared_experts=2),
    _case("raw_weights", norm_topk_prob=False, routed_scaling_factor=2.5),
    _case("full_rank_queries", q_lora_rank=None),
    _case("half_split_rope", "scratch", rope_interleave=False),
    _case("tied", "scratch", tie_word_embeddings=True),
    _case("two_dense", "scratch", num_hidden_layers=4, mlp_layer_types=["dense", "dense", "sparse", "sparse"]),
    _case("two_dense_original", first_k_dense_replace=2, num_hidden_layers=4),
    _case("alternating", "scratch", num_hidden_layers=4, mlp_layer_types=["sparse", "dense", "sparse", "dense"]),
    _case("one_dense_layer", num_hidden_layers=1),
    _case("one_sparse_layer", "resaved", num_hidden_layers=1, first_k_dense_replace=0, mlp_layer_types=["sparse"]),
    _case("all_at_once", "resaved", num_hidden_layers=4, **_ALL_AT_ONCE),
)
