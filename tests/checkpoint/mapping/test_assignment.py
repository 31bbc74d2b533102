"""Rule table, matching and assignment: one rule per tensor, every parameter once, all disagreements in one message."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.checkpoint.folder.layout import checkpoint_layout
from glm_jax.checkpoint.formats.base import StoredWeight
from glm_jax.checkpoint.mapping.assignment import assign_tensors
from glm_jax.checkpoint.mapping.matching import TensorMatcher, leaf_slots
from glm_jax.checkpoint.mapping.rules import TENSOR_RULES
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights.params import leaves_with_path, param_specs
from tests.builders import hf_checkpoints, hf_configs

CONFIGS = {
    "original": hf_configs.odd_size_config(),
    "resaved": hf_configs.resaved_config(**hf_configs.ODD_SIZES),
    "from scratch": hf_configs.from_scratch_config(**hf_configs.ODD_SIZES),
    "two dense layers": hf_configs.odd_size_config(first_k_dense_replace=2),
    "all dense": hf_configs.odd_size_config(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "no dense layer": hf_configs.odd_size_config(first_k_dense_replace=0),
    "full-rank queries": hf_configs.odd_size_config(q_lora_rank=None),
    "two shared experts": hf_configs.odd_size_config(n_shared_experts=2),
    "tied": hf_configs.odd_size_config(tie_word_embeddings=True),
    "no prediction layer": hf_configs.odd_size_config(num_nextn_predict_layers=0),
}


def weights_of_shapes(shapes, dtype=np.float32):
    return {name: stored(name, shape, dtype) for name, shape in shapes.items()}


def stored(name, shape, dtype=np.float32):
    return StoredWeight(name, shape, np.dtype(dtype), None, (name,), lambda _: np.zeros(shape, dtype))


def small():
    """A config and the weights it needs, without the prediction layer's copies."""
    config = hf_configs.odd_size_config()
    return Config.from_hf(config), weights_of_shapes(hf_checkpoints.tensor_shapes(config, own_mtp=False))


def problems(cfg, weights, aliases=None):
    with pytest.raises(CheckpointError) as caught:
        assign_tensors(cfg, weights, aliases or {})
    return str(caught.value)


def test_tables_name_no_tensor_twice():
    for rules in TENSOR_RULES.values():
        assert max(Counter(rule.name for rule in rules).values()) == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_slot_is_filled_once(config):
    cfg = Config.from_hf(config)
    shapes = hf_checkpoints.tensor_shapes(config, own_mtp=False)
    filled = assign_tensors(cfg, weights_of_shapes(shapes), {})
    needed = [slot for members in checkpoint_layout(cfg).values() for leaf in members for slot in leaf_slots(leaf)]
    assert sorted(filled, key=str) == sorted(needed, key=str)
    assert {tensor.name for tensor in filled.values()} == set(shapes)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_expected_names_and_shapes_are_the_checkpoints(config):
    expected = [(tensor.name, tensor.shape) for tensor in TensorMatcher(Config.from_hf(config)).expected_tensors()]
    assert len(expected) == len(dict(expected))
    assert dict(expected) == hf_checkpoints.tensor_shapes(config, own_mtp=False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parts_hold_every_parameter_once(config):
    """The layout on disk is the parameter tree, split by layer."""
    cfg = Config.from_hf(config)
    members = [leaf for part in checkpoint_layout(cfg).values() for leaf in part]
    assert len({(leaf.checkpoint_name, leaf.name) for leaf in members}) == len(members)
    assert len({(leaf.param_path, leaf.stack_index) for leaf in members}) == len(members)
    assert sum(leaf.size for leaf in members) == sum(spec.size for _, spec in leaves_with_path(param_specs(cfg)))


def test_full_size_model_is_the_one_on_the_hub():
    """9,703 tensors and 31,221,488,576 parameters, including the prediction layer's two copies, which are not kept."""
    cfg = Config.flash()
    tensors = list(TensorMatcher(cfg).expected_tensors())
    copies = 2 * cfg.vocab_size * cfg.hidden_size
    assert len(tensors) + 2 == 9_703
    assert sum(math.prod(tensor.shape) for tensor in tensors) + copies == 31_221_488_576
    main = [t for t in tensors if not t.name.startswith("model.layers.47.")]
    assert len(main) == 9_491
    assert sum(math.prod(tensor.shape) for tensor in main) == 29_943_393_920


def test_router_is_not_a_swiglu_branch():
    cfg, _ = small()
    matcher = TensorMatcher(cfg)
    router = matcher.match("model.layers.1.mlp.gate.weight")
    branch = matcher.match("model.layers.0.mlp.gate_proj.weight")
    assert router is not None
    assert router.rule.param_names == ("moe.router",)
    assert branch is not None
    assert branch.rule.param_names == ("mlp.gate",)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.4.input_layernorm.weight",  # past the prediction layer
        "model.layers.01.input_layernorm.weight",
        "model.layers.99999999999999999999.input_layernorm.weight",
        "model.layers.1.mlp.experts.7.gate_proj.weight",  # seven experts: 0 to 6
        "model.layers.1.mlp.experts.00.gate_proj.weight",
        "model.layers.1.mlp.experts.x.gate_proj.weight",
        "model.layers.1.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",  # layer 1 is sparse
        "model.layers.0.mlp.gate.weight",  # layer 0 is dense
        "model.layers.1.self_attn.q_proj.weight",  # queries have a low rank here
        "model.layers.1.self_attn.q_a_proj.bias",
        "model.layers.1.embed_tokens.weight",  # only the prediction layer has one
        "model.layers.1.",
        "model.layers.1.input_layernorm.weight\n",
        "model.embed_tokens.weight ",
        "embed_tokens.weight",
        "input_layernorm.weight",
        "rest",
        "",
    ],
)
def test_names_that_are_not_the_models(name):
    cfg, _ = small()
    assert TensorMatcher(cfg).match(name) is None


@given(st.text(max_size=60) | st.from_regex(r"model\.layers\.\d{1,12}\.[a-z_.0-9]{1,40}", fullmatch=True))
def test_any_name_is_matched_or_not(name):
    cfg, weights = small()
    assert (TensorMatcher(cfg).match(name) is not None) == (name in weights or name in _EXTRA)


_EXTRA = {
    *(f"model.layers.{layer}.mlp.experts.{part}" for layer in (1, 2, 3) for part in ("gate_up_proj", "down_proj")),
}


def test_all_problems_come_together():
    cfg, weights = small()
    del weights["model.norm.weight"]
    del weights["model.layers.1.self_attn.kv_b_proj.weight"]
    weights["model.layers.9.extra"] = weights["lm_head.weight"]
    weights["lm_head.weight"] = stored("lm_head.weight", (7, 7), np.float32)
    weights["model.layers.2.mlp.gate.weight"] = stored("model.layers.2.mlp.gate.weight", (7, 40), np.int32)
    weights["model.layers.1.mlp.experts.down_proj"] = stored(
        "model.layers.1.mlp.experts.down_proj", (7, 40, 12), np.float32
    )
    text = problems(cfg, weights)
    assert "2 missing: model.layers.1.self_attn.kv_b_proj.weight, model.norm.weight" in text
    assert "1 unknown: model.layers.9.extra" in text
    assert "8 given more than once: model.layers.1.mlp.experts.0.down_proj.weight" in text
    assert "1 of the wrong shape: lm_head.weight is [7, 7], the config needs [131, 40]" in text
    assert "1 of a dtype that weights cannot have" in text
    assert "model.layers.2.mlp.gate.weight is I32" in text


def test_long_lists_are_cut_and_counted():
    cfg, _ = small()
    text = problems(cfg, {})
    assert "missing: model.embed_tokens.weight" in text
    assert "… and " in text
    assert len(text) < 2000


def test_absurd_configs_end_soon():
    cfg, weights = small()
    text = problems(cfg.replace(n_routed_experts=10**9), weights)
    assert "at least 10000 missing: model.layers.1.mlp.experts.7.gate_proj.weight" in text
    assert "model.layers.1.mlp.gate.weight is [7, 40], the config needs [1000000000, 40]" in text


def test_one_expert_short():
    cfg, weights = small()
    del weights["model.layers.2.mlp.experts.6.up_proj.weight"]
    assert "1 missing: model.layers.2.mlp.experts.6.up_proj.weight" in problems(cfg, weights)


def test_float64_is_not_narrowed_silently():
    cfg, weights = small()
    weights["model.norm.weight"] = stored("model.norm.weight", (40,), np.float64)
    assert "model.norm.weight is F64" in problems(cfg, weights)


def test_names_from_files_are_made_printable():
    cfg, weights = small()
    weights["\x1b[31m\ud800"] = weights["model.norm.weight"]
    text = problems(cfg, weights)
    assert "\x1b" not in text
    text.encode("utf-8")
