"""Configs built from metadata fields: those of real files, of other models, and impossible ones."""

import numpy as np
import pytest

from glm_jax.checkpoint.formats.gguf.hf_config import build_hf_config
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from tests.builders.gguf_files import architecture_fields, small_mtp_config
from tests.builders.hf_configs import original_config

SHAPES = {"token_embd.weight": (154_880, 2048), "output.weight": (154_880, 2048), "blk.47.nextn.enorm.weight": (2048,)}
FLASH = {"general.architecture": "deepseek2", **architecture_fields(original_config())}


def config(changes=(), shapes=SHAPES, **more):
    changes = {f"deepseek2.{key}": value for key, value in {**dict(changes), **more}.items()}
    fields = {key: value for key, value in (FLASH | changes).items() if value is not None}
    return build_hf_config(fields, shapes, "m.gguf")


def refused(words, changes):
    with pytest.raises(CheckpointError, match=words) as caught:
        config(changes)
    assert "\n" not in str(caught.value)


def test_the_real_files():
    assert Config.from_hf(config()) == Config.flash()
    main = {name: shape for name, shape in SHAPES.items() if "nextn" not in name}
    without = config({"block_count": 47, "nextn_predict_layers": None}, main)
    assert Config.from_hf(without) == Config.flash().replace(num_nextn_predict_layers=0)


def test_numbers_are_those_that_were_meant():
    single = {
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "expert_weights_scale": float(np.float32(1.8)),
    }
    read = config(single)
    assert (read["rms_norm_eps"], read["routed_scaling_factor"]) == (1e-5, 1.8)


def test_small_odd_sizes():
    fields = {"general.architecture": "deepseek2", **architecture_fields(small_mtp_config())}
    shapes = {"token_embd.weight": (131, 40), "blk.3.attn_norm.weight": (40,), "output.weight": (131, 40)}
    assert Config.from_hf(build_hf_config(fields, shapes, "m.gguf")) == Config.from_hf(small_mtp_config())


def test_what_is_absent_is_what_llama_cpp_takes():
    absent = ("expert_shared_count", "expert_group_count", "expert_group_used_count", "expert_weights_norm")
    read = config(dict.fromkeys([*absent, "expert_weights_scale", "rope.freq_base", "attention.q_lora_rank"]))
    assert (read["n_shared_experts"], read["n_group"], read["topk_group"], read["norm_topk_prob"]) == (0, 1, 1, False)
    assert (read["routed_scaling_factor"], read["rope_theta"], read["q_lora_rank"]) == (1.0, 10_000.0, None)


def test_the_vocabulary_is_that_of_the_embedding_where_nothing_is_said():
    assert config(vocab_size=None)["vocab_size"] == 154_880


def test_every_stop_counts_once():
    assert config()["eos_token_id"] == [154_820, 154_827, 154_829]
    fields = FLASH | {"tokenizer.ggml.eos_token_ids": np.array([154_829, 5], np.int32)}
    assert build_hf_config(fields, SHAPES, "m.gguf")["eos_token_id"] == [154_820, 154_827, 154_829, 5]
    del fields["tokenizer.ggml.eom_token_id"]
    del fields["tokenizer.ggml.eos_token_ids"]
    assert build_hf_config(fields, SHAPES, "m.gguf")["eos_token_id"] == [154_820, 154_827]


def test_a_missing_gating_function_is_the_sigmoid():
    assert config(expert_gating_func=None) == config()


def test_softmax_files_are_refused_with_the_way_out():
    refused(r"m\.gguf: expert_gating_func is 1 \(softmax\).*gguf-set-metadata FILE", {"expert_gating_func": 1})
    refused("expert_gating_func is 3, but", {"expert_gating_func": 3})


@pytest.mark.parametrize(
    "harmless",
    [
        {"rope.scaling.type": "none"},
        {"rope.scaling.factor": 1.0},
        {"rope.scaling.yarn_log_multiplier": 0.1, "rope.scaling.original_context_length": 4096},
        {"attention.sliding_window": 0, "some.flag": False, "a.name": "", "b.list": np.zeros(3, np.int32)},
        {"expert_shared_feed_forward_length": 1536},
        {"attention.head_count_kv": 20},
        {"attention.causal": True},
    ],
)
def test_fields_that_change_nothing(harmless):
    assert config(harmless) == config()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 40.0}, r"rope scaling \('yarn'\) is not supported"),
        ({"rope.scaling.factor": 2.0}, r"rope scaling \(None\) is not supported"),
        ({"attention.head_count_kv": 4}, "head_count_kv must be 1 or 20"),
        ({"attention.sliding_window": 512}, r"does not understand: deepseek2\.attention\.sliding_window"),
        ({"attention.scale": 0.25, "logit_scale": 2.0}, r"understand: .*attention\.scale, deepseek2\.logit_scale"),
        ({"layers": np.array([0, 3])}, r"understand: deepseek2\.layers"),
        ({"words": [b"x"]}, r"understand: deepseek2\.words"),
        ({"expert_shared_feed_forward_length": 99}, "expert_shared_feed_forward_length must be 1536"),
        ({"embedding_length": None}, r"m\.gguf lacks the field deepseek2\.embedding_length"),
        ({"attention.layer_norm_rms_epsilon": None}, r"lacks the field deepseek2\.attention\.layer_norm_rms_epsilon"),
        ({"block_count": -1}, r"deepseek2\.block_count must be a whole number, not -1"),
        ({"block_count": 47.0}, "must be a whole number, not 47.0"),
        ({"expert_count": True}, "must be a whole number, not True"),
        ({"attention.head_count": np.array([20, 20])}, r"head_count must be a whole number, not array"),
        ({"rope.freq_base": "big"}, r"rope\.freq_base must be a number, not 'big'"),
        ({"rope.freq_base": float("nan")}, r"rope\.freq_base must be a number, not nan"),
        ({"expert_weights_norm": 1}, "expert_weights_norm must be true or false, not 1"),
        ({"attention.key_length_mla": 64}, r"a key of 64 values cannot contain the 64 of rope\.dimension_count"),
    ],
)
def test_fields_that_cannot_be(changes, words):
    refused(words, changes)


def test_halves_without_their_head_sizes():
    shapes = SHAPES | {"blk.0.attn_k_b.weight": (20, 512, 192)}
    with pytest.raises(CheckpointError, match="key_length_mla and value_length_mla are missing: get a newer file"):
        config({"attention.key_length_mla": None}, shapes)


@pytest.mark.parametrize("architecture", ["glm4moe", None, 7])
def test_another_architecture(architecture):
    fields = FLASH | {"general.architecture": architecture}
    with pytest.raises(CheckpointError, match=rf"architecture {architecture!r}; GGUF files .* have 'deepseek2'"):
        build_hf_config(fields, SHAPES, "m.gguf")


def test_a_stop_that_is_no_token():
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.eot_token_id must be a whole number, not 'x'"):
        build_hf_config(FLASH | {"tokenizer.ggml.eot_token_id": "x"}, SHAPES, "m.gguf")
