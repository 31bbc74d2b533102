"""A config.json that we write means the same to transformers as the one that we read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from glm_jax.config import _DEFAULTS, Config
from tests.builders.hf_checkpoints import tensor_shapes
from tests.builders.hf_configs import from_scratch_config, original_config, resaved_config
from tests.builders.jitted_model import random_tokens
from tests.parity import hf_models
from tests.parity.cases import CASES, ParityCase

SAME = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads n_shared_experts n_routed_experts routed_scaling_factor kv_lora_rank q_lora_rank
    qk_rope_head_dim v_head_dim qk_nope_head_dim n_group topk_group num_experts_per_tok norm_topk_prob hidden_act
    max_position_embeddings rms_norm_eps tie_word_embeddings rope_interleave mlp_layer_types attention_bias
    eos_token_id pad_token_id""".split()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_written_config_means_the_same(case: ParityCase, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Config.from_hf(case.config).to_hf()))
    ours: Any = Glm4MoeLiteConfig.from_pretrained(tmp_path)
    expected: Any = hf_models.build_random_model(case).config
    assert {name: getattr(ours, name) for name in SAME} == {name: getattr(expected, name) for name in SAME}
    assert ours.rope_parameters["rope_theta"] == expected.rope_parameters["rope_theta"]
    assert ours.rope_parameters["rope_type"] == "default"


def test_written_config_gives_the_same_logits(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "all_at_once")
    model = hf_models.build_random_model(case)
    model.save_pretrained(tmp_path)
    ids = random_tokens(case.config, 1, 12)
    expected = hf_models.compute_logits(hf_models.load_model(tmp_path), ids)
    (tmp_path / "config.json").write_text(json.dumps(Config.from_hf(case.config).to_hf()))
    again = Glm4MoeLiteForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert np.array_equal(hf_models.compute_logits(again, ids), expected)


@pytest.mark.parametrize("spelling", [original_config, resaved_config, from_scratch_config])
def test_our_spellings_are_transformers_own(spelling: Any, tmp_path: Path) -> None:
    """The dictionaries that the tests use lose nothing and gain nothing when transformers loads and saves them."""
    (tmp_path / "config.json").write_text(json.dumps(spelling()))
    Glm4MoeLiteConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert Config.from_hf(saved) == Config.from_hf(spelling())
    if spelling is resaved_config:
        assert set(saved) - set(resaved_config()) <= {"output_router_logits", "rope_scaling"}


def test_absent_keys_mean_what_they_mean_to_transformers() -> None:
    names = set(SAME) & set(_DEFAULTS)
    ours = Config.from_hf({key: value for key, value in original_config().items() if key not in names})
    theirs_by_default = Glm4MoeLiteConfig()
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs_by_default, name) for name in names}


def test_names_and_shapes_on_disk(tmp_path: Path) -> None:
    case = CASES[0]
    hf_models.build_random_model(case).save_pretrained(tmp_path)
    on_disk = {}
    for file in tmp_path.glob("*.safetensors"):
        on_disk |= {name: tuple(t.shape) for name, t in safetensors.torch.load_file(file).items()}
    assert on_disk == tensor_shapes({**case.config, "num_nextn_predict_layers": 0})
