"""Config: real spellings of config.json, rejected values, and the sizes of GLM-4.7-Flash."""

import dataclasses
import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.cache import LatentCache
from glm_jax.cache.latent import bytes_per_token
from glm_jax.config import Config
from glm_jax.errors import ConfigError, GlmError
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.storage import abstract_params
from tests.builders.hf_checkpoints import random_tensors, to_params
from tests.builders.hf_configs import (
    ODD_SIZES,
    HfConfig,
    from_scratch_config,
    layer_kinds,
    odd_size_config,
    original_config,
    resaved_config,
)

ALL_SPELLINGS = [original_config, resaved_config, from_scratch_config]
DENSE, SPARSE = "dense", "sparse"


# -- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [original_config, resaved_config])
def test_flash_in_both_spellings(spelling: Any) -> None:
    assert Config.from_hf(spelling()) == Config.flash()


def test_flash_from_scratch_has_no_prediction_layer() -> None:
    assert Config.from_hf(from_scratch_config()) == Config.flash().replace(num_nextn_predict_layers=0)


@pytest.mark.parametrize("spelling", ALL_SPELLINGS)
def test_every_field_comes_from_the_file(spelling: Any) -> None:
    cfg = Config.from_hf(spelling(**ODD_SIZES, n_shared_experts=2, norm_topk_prob=False, routed_scaling_factor=0.5))
    for name, value in ODD_SIZES.items():
        if name not in ("num_key_value_heads", "eos_token_id"):
            assert getattr(cfg, name) == value, name
    assert cfg.eos_token_ids == (2, 7)
    assert (cfg.n_shared_experts, cfg.norm_topk_prob, cfg.routed_scaling_factor) == (2, False, 0.5)
    assert (cfg.rms_norm_eps, cfg.latent_eps, cfg.rope_interleave) == (1e-5, 1e-6, True)
    assert cfg.mlp_layer_types == (DENSE, SPARSE, SPARSE)
    assert (cfg.qk_head_dim, cfg.cache_width) == (10, 18)


def test_latent_eps_is_chosen_by_the_caller() -> None:
    assert Config.from_hf(original_config(), latent_eps=1e-5).latent_eps == 1e-5


def test_pruned_relative() -> None:
    cfg = Config.from_hf(original_config(n_routed_experts=48, num_nextn_predict_layers=0))
    assert (cfg.n_routed_experts, cfg.num_nextn_predict_layers) == (48, 0)
    assert "mtp" not in param_specs(cfg)


@pytest.mark.parametrize(
    "extra",
    [
        {"torch_dtype": "bfloat16", "scoring_func": "sigmoid"},
        {"head_dim": 64},
        {"moe_layer_freq": 1},
        {"num_local_experts": 64},
        {"_name_or_path": "somewhere"},
        {"num_key_value_heads": 1},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_keys_of_derived_checkpoints_change_nothing(extra: HfConfig) -> None:
    assert Config.from_hf(original_config(**extra)) == Config.flash()


def test_default_theta_without_any_rope_key() -> None:
    config = original_config()
    del config["rope_theta"], config["rope_scaling"]
    assert Config.from_hf(config).rope_theta == 10_000.0


@pytest.mark.parametrize(
    "key",
    """q_lora_rank n_shared_experts n_group topk_group norm_topk_prob routed_scaling_factor rope_interleave rms_norm_eps
    max_position_embeddings tie_word_embeddings""".split(),
)
def test_an_absent_key_has_the_value_of_the_real_model(key: str) -> None:
    """This is also transformers' default, which tests/parity checks."""
    assert Config.from_hf({k: v for k, v in original_config().items() if k != key}) == Config.flash()


def test_num_local_experts_is_an_alias() -> None:
    config = original_config()
    config["num_local_experts"] = config.pop("n_routed_experts")
    assert Config.from_hf(config) == Config.flash()


def test_a_file_without_the_dense_keys_has_one_dense_layer() -> None:
    config = odd_size_config(num_hidden_layers=4)
    del config["first_k_dense_replace"]
    assert Config.from_hf(config).mlp_layer_types == (DENSE, SPARSE, SPARSE, SPARSE)


@pytest.mark.parametrize(("value", "ids"), [(5, (5,)), ([5], (5,)), ([2, 7, 9], (2, 7, 9)), (None, ())])
def test_end_tokens_as_number_or_list(value: Any, ids: tuple[int, ...]) -> None:
    assert Config.from_hf(odd_size_config(eos_token_id=value)).eos_token_ids == ids


# -- which layers are dense -------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([DENSE, SPARSE]), min_size=1, max_size=9))
def test_layer_groups_cover_the_layers_in_order(kinds: list[str]) -> None:
    config = from_scratch_config(**{**ODD_SIZES, "num_hidden_layers": len(kinds)}, mlp_layer_types=kinds)
    groups = Config.from_hf(config).layer_groups
    assert [group.kind for group in groups for _ in range(group.count)] == kinds
    assert [group.start for group in groups] == [sum(g.count for g in groups[:i]) for i in range(len(groups))]
    assert all(a.kind != b.kind for a, b in pairwise(groups))


@given(st.lists(st.sampled_from([DENSE, SPARSE]), min_size=1, max_size=6), st.integers(0, 6))
def test_layer_types_and_first_dense_must_agree(kinds: list[str], first: int) -> None:
    sizes = {**ODD_SIZES, "num_hidden_layers": len(kinds), "first_k_dense_replace": first}
    config = original_config(**sizes, mlp_layer_types=kinds)
    if kinds == [DENSE] * min(first, len(kinds)) + [SPARSE] * (len(kinds) - first):
        assert list(Config.from_hf(config).mlp_layer_types) == kinds
    else:
        with pytest.raises(ConfigError, match=r"mlp_layer_types .* first_k_dense_replace"):
            Config.from_hf(config)


# -- rejected values --------------------------------------------------------------------------------------------------

REJECTED: dict[str, tuple[HfConfig, str]] = {
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    "yarn_new_key": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "rope_parameters": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000, "factor": 4.0}}, "yarn"),
    "scaling_without_type": ({"rope_scaling": {"factor": 4.0}}, "factor"),
    "scaling_not_a_dict": ({"rope_scaling": "yarn"}, "rope_scaling"),
    "two_thetas": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta"),
    "theta_text": ({"rope_theta": "1e6"}, "rope_theta"),
    "theta_infinite": ({"rope_theta": float("inf")}, "rope_theta"),
    "eps_infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "two_numbers_of_experts": ({"num_local_experts": 63}, "num_local_experts"),
    "millions_of_layers": ({"num_hidden_layers": 3_000_000}, "at most 1,000"),
    "unknown_key_zero": ({"sliding_window": 0}, "sliding_window"),
    "theta_negative": ({"rope_theta": -1.0}, "rope_theta"),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "unknown_key": ({"sliding_window": 4096}, "sliding_window"),
    "attention_bias": ({"attention_bias": True}, "attention_bias"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "softmax_router": ({"scoring_func": "softmax"}, "scoring_func"),
    "topk_method": ({"topk_method": "greedy"}, "topk_method"),
    "moe_layer_freq": ({"moe_layer_freq": 2}, "moe_layer_freq"),
    "architecture": ({"model_type": "llama"}, "llama"),
    "hidden_text": ({"hidden_size": "2048"}, "hidden_size"),
    "hidden_float": ({"hidden_size": 2048.5}, "hidden_size"),
    "hidden_zero": ({"hidden_size": 0}, "hidden_size"),
    "hidden_bool": ({"hidden_size": True}, "hidden_size"),
    "layers_negative": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "layers_text": ({"num_hidden_layers": "47"}, "num_hidden_layers"),
    "heads_negative": ({"num_attention_heads": -20}, "num_attention_heads"),
    "rope_width_odd": ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    "rope_width_text": ({"qk_rope_head_dim": "64"}, "qk_rope_head_dim"),
    "head_dim": ({"head_dim": 128}, "head_dim"),
    "qk_head_dim": ({"qk_head_dim": 128}, "qk_head_dim"),
    "q_rank_zero": ({"q_lora_rank": 0}, "q_lora_rank"),
    "top_k_too_large": ({"num_experts_per_tok": 65}, "num_experts_per_tok"),
    "groups_do_not_divide": ({"n_group": 5}, "n_group"),
    "groups_of_one": ({"n_group": 64}, "n_group"),
    "too_many_groups_kept": ({"n_group": 4, "topk_group": 5}, "topk_group"),
    "too_few_kept": ({"n_group": 32, "topk_group": 1}, "num_experts_per_tok"),
    "eps_negative": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "eps_nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "scale_text": ({"routed_scaling_factor": "1.8"}, "routed_scaling_factor"),
    "norm_topk_number": ({"norm_topk_prob": 1}, "norm_topk_prob"),
    "two_prediction_layers": ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    "eos_outside": ({"eos_token_id": [154880]}, "eos_token_id"),
    "eos_text": ({"eos_token_id": "</s>"}, "eos_token_id"),
    "layer_type": ({"mlp_layer_types": [DENSE] + ["moe"] * 46}, "mlp_layer_types"),
    "layer_types_text": ({"mlp_layer_types": "dense"}, "mlp_layer_types"),
    "layer_types_short": ({"mlp_layer_types": [DENSE] + [SPARSE] * 45}, "mlp_layer_types"),
    "first_dense_negative": ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
}


@pytest.mark.parametrize(("changes", "word"), REJECTED.values(), ids=REJECTED)
def test_errors_name_the_key(changes: HfConfig, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        Config.from_hf(original_config(**changes))
    assert isinstance(caught.value, GlmError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "kv_lora_rank", "num_experts_per_tok", "v_head_dim"])
def test_missing_keys_are_named(key: str) -> None:
    config = original_config()
    del config[key]
    with pytest.raises(ConfigError, match=key):
        Config.from_hf(config)


JSON = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text(max_size=3)
JSON = JSON | st.lists(JSON, max_size=2) | st.dictionaries(st.text(max_size=3), JSON, max_size=2)


@given(st.sampled_from(sorted(resaved_config())), JSON)
def test_any_value_of_any_key_is_read_or_rejected(key: str, value: Any) -> None:
    config = resaved_config(**ODD_SIZES) | {key: value}
    with suppress(ConfigError):
        assert hash(Config.from_hf(config)) is not None


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="mlp_layer_types"):
        Config.flash().replace(mlp_layer_types=(DENSE, "moe", *[SPARSE] * 45))
    with pytest.raises(ConfigError, match="mlp_layer_types"):
        Config.flash().replace(mlp_layer_types=[DENSE, *[SPARSE] * 46])
    with pytest.raises(ConfigError, match="vocab_size"):
        Config.flash().replace(vocab_size=-1)


# -- value semantics and round trips ----------------------------------------------------------------------------------


def test_frozen_and_hashable() -> None:
    cfg = Config.flash()
    assert {cfg: 1}[Config.from_hf(original_config())] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.vocab_size = 3  # pyright: ignore[reportAttributeAccessIssue]


ROUND_TRIPS = {
    "flash": original_config(),
    "scratch": from_scratch_config(),
    "odd": odd_size_config(),
    "alternating": from_scratch_config(
        **{**ODD_SIZES, "num_hidden_layers": 4}, mlp_layer_types=[SPARSE, DENSE, DENSE, SPARSE]
    ),
    "variants": resaved_config(
        **{**ODD_SIZES, "n_routed_experts": 12, "num_experts_per_tok": 4, "q_lora_rank": None},
        n_group=3,
        topk_group=2,
        norm_topk_prob=False,
        n_shared_experts=2,
        rope_interleave=False,
        tie_word_embeddings=True,
        first_k_dense_replace=2,
    ),
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_to_hf_round_trip(config: HfConfig) -> None:
    cfg = Config.from_hf(config)
    written = json.loads(json.dumps(cfg.to_hf()))
    assert Config.from_hf(written) == cfg
    assert written["mlp_layer_types"] == layer_kinds({**config, "num_nextn_predict_layers": 0})
    assert written["num_nextn_predict_layers"] == cfg.num_nextn_predict_layers
    assert written["rope_parameters"]["rope_theta"] == cfg.rope_theta
    assert written["num_key_value_heads"] == cfg.num_attention_heads


def test_to_hf_of_the_original_keeps_its_values() -> None:
    written = Config.flash().to_hf()
    unchanged = {
        k: v for k, v in original_config().items() if k not in ("rope_scaling", "dtype", "transformers_version")
    }
    assert {key: written.get(key) for key in unchanged} == unchanged


# -- sizes of GLM-4.7-Flash -------------------------------------------------------------------------------------------


def count(tree: Any) -> int:
    return sum(spec.size for _, spec in leaves_with_path(tree))


def test_parameter_counts_of_flash() -> None:
    tree = param_specs(Config.flash())
    assert count(tree) - count(tree["mtp"]) == 29_943_393_920
    assert count(tree["mtp"]) == 643_706_176
    assert count(param_specs(Config.flash().replace(mtp_own_embeddings=True))) == 31_221_488_576
    assert count(tree["runs"]["0"]) == 84_677_888
    assert count(tree["runs"]["1"]) == 46 * 635_311_424
    assert count(tree["embed"] if isinstance(tree["embed"], dict) else {"embed": tree["embed"]}) == 317_194_240


def test_cache_bytes_of_flash() -> None:
    assert bytes_per_token(Config.flash()) == 54_144
    assert LatentCache.create(odd_config(), 2, 3).data.nbytes == 2 * 3 * bytes_per_token(odd_config())


def odd_config(**changes: Any) -> Config:
    return Config.from_hf(odd_size_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"tie_word_embeddings": True},
        {"n_shared_experts": 3},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"num_nextn_predict_layers": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [False, True], ids=["shared_table", "own_table"])
def test_specs_are_the_shapes_of_a_checkpoint(changes: HfConfig, own: bool) -> None:
    config = odd_size_config(**changes)
    cfg = Config.from_hf(config).replace(mtp_own_embeddings=own and config["num_nextn_predict_layers"] == 1)
    params = to_params(random_tensors(config, 0, own_mtp=own), cfg)
    specs = dict(leaves_with_path(param_specs(cfg)))
    assert {path: spec.shape for path, spec in specs.items()} == {path: a.shape for path, a in leaves_with_path(params)}
    assert all(len(spec.axes) == len(spec.shape) for spec in specs.values())
    abstract = dict(leaves_with_path(abstract_params(cfg, "bfloat16")))
    assert {path: a.shape for path, a in abstract.items()} == {path: spec.shape for path, spec in specs.items()}
    wide = {path for path, a in abstract.items() if a.dtype == np.float32}
    assert wide == {path for path in specs if path[-1] == "router_bias"}
