"""A model written as GGUF is read back under its logical names, value for value."""

import re

import numpy as np
import pytest

from glm_jax.checkpoint.formats.gguf import open_gguf
from glm_jax.checkpoint.formats.gguf.ggml_types import GGML_TYPES
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor
from tests.builders.gguf_files import (
    architecture_fields,
    gguf_dequantize,
    random_blocks,
    small_mtp_config,
    to_gguf_tensors,
    write_gguf,
)
from tests.builders.hf_checkpoints import random_tensors

CONFIG = small_mtp_config()
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(CONFIG, 0, own_mtp=True)


@pytest.fixture(scope="module")
def opened(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return open_gguf(write_gguf(path, to_gguf_tensors(tensors, CONFIG), architecture_fields(CONFIG)))


def write_and_open(tmp_path, config, tensors, **changes):
    return open_gguf(write_gguf(tmp_path / "m.gguf", tensors, architecture_fields(config) | changes))


def logical(tensors, config):
    """Weights of a Hugging Face checkpoint under the names and shapes that the GGUF reader gives them."""
    out, experts = {}, {}
    for name, array in tensors.items():
        if found := re.fullmatch(r"(.+\.mlp)\.experts\.\d+\.(\w+_proj\.weight)", name):
            experts.setdefault(f"{found[1]}.switch_mlp.{found[2]}", []).append(array)
        elif name.endswith("kv_b_proj.weight"):
            heads = array.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope, prefix = config["qk_nope_head_dim"], name.removesuffix("kv_b_proj.weight")
            out[f"{prefix}embed_q.weight"] = heads[:, :nope].transpose(0, 2, 1)
            out[f"{prefix}unembed_out.weight"] = heads[:, nope:]
        else:
            out[name] = array
    return out | {name: np.stack(arrays) for name, arrays in experts.items()}


def test_every_weight_comes_back(opened, tensors):
    expected = logical(tensors, CONFIG)
    assert set(opened.weights) == set(expected)
    for name, array in expected.items():
        stored = opened.weights[name]
        assert (stored.name, stored.shape, stored.dtype, stored.spec) == (name, array.shape, np.float32, None)
        np.testing.assert_array_equal(stored.load(None), array)
        np.testing.assert_array_equal(stored.load(2), array[2])


def test_the_config_is_understood_and_the_same(opened):
    assert Config.from_hf(opened.config) == Config.from_hf(CONFIG)
    assert opened.config["num_nextn_predict_layers"] == 1
    assert opened.notes == ()


def test_nothing_is_copied_before_it_is_used(opened):
    whole = opened.weights["model.embed_tokens.weight"].load(None)
    assert not whole.flags.owndata
    assert not whole.flags.writeable
    assert whole.flags.aligned


def test_without_a_prediction_layer(tmp_path):
    config = small_mtp_config(num_hidden_layers=2) | {"num_nextn_predict_layers": 0}
    tensors = random_tensors(config, 1)
    opened = write_and_open(tmp_path, config, to_gguf_tensors(tensors, config))
    assert set(opened.weights) == set(logical(tensors, config))
    assert Config.from_hf(opened.config) == Config.from_hf(config)


def test_a_prediction_layer_that_was_left_out(tmp_path):
    """Files of requantized models announce the prediction layer even without its tensors."""
    tensors = random_tensors(CONFIG, 1)
    kept = {n: a for n, a in to_gguf_tensors(tensors, CONFIG).items() if not n.startswith("blk.3.")}
    opened = write_and_open(tmp_path, CONFIG, kept)
    assert opened.config["num_nextn_predict_layers"] == 0
    assert opened.config["num_hidden_layers"] == 3
    assert not any(name.startswith("model.layers.3.") for name in opened.weights)


def test_tied_embeddings(tmp_path, tensors):
    kept = {n: a for n, a in to_gguf_tensors(tensors, CONFIG).items() if n != "output.weight"}
    assert write_and_open(tmp_path, CONFIG, kept).config["tie_word_embeddings"] is True


def test_without_low_rank_queries(tmp_path):
    config = small_mtp_config(q_lora_rank=None)
    tensors = random_tensors(config, 2)
    opened = write_and_open(tmp_path, config, to_gguf_tensors(tensors, config))
    assert opened.config["q_lora_rank"] is None
    assert set(opened.weights) == set(logical(tensors, config))


def test_old_files_with_kv_b_whole(tmp_path, tensors):
    """Before kv_b was split into halves, the general keys held the sizes of expanded heads."""
    fields = architecture_fields(CONFIG)
    heads = CONFIG["num_attention_heads"]
    for key in ("key_length_mla", "value_length_mla"):
        del fields[f"deepseek2.attention.{key}"]
    fields |= {
        "deepseek2.attention.key_length": CONFIG["qk_nope_head_dim"] + CONFIG["qk_rope_head_dim"],
        "deepseek2.attention.value_length": CONFIG["v_head_dim"],
        "deepseek2.attention.head_count_kv": heads,
    }
    opened = open_gguf(write_gguf(tmp_path / "m.gguf", to_gguf_tensors(tensors, CONFIG, split_kv_b=False), fields))
    assert Config.from_hf(opened.config) == Config.from_hf(CONFIG)
    name = f"{LAYER}.self_attn.kv_b_proj.weight"
    np.testing.assert_array_equal(opened.weights[name].load(None), tensors[name])


def test_kv_b_beside_its_halves_is_left_out_and_said(tmp_path, tensors):
    both = to_gguf_tensors(tensors, CONFIG) | to_gguf_tensors(tensors, CONFIG, split_kv_b=False)
    opened = write_and_open(tmp_path, CONFIG, both)
    assert set(opened.weights) == set(logical(tensors, CONFIG))
    assert opened.notes == ("attn_kv_b is left out where the file has its halves as well",)


def test_halves_written_as_one_matrix(tmp_path, tensors):
    flat = {
        n: a.reshape(-1, a.shape[-1]) if n.endswith(("attn_k_b.weight", "attn_v_b.weight")) else a
        for n, a in to_gguf_tensors(tensors, CONFIG).items()
    }
    opened = write_and_open(tmp_path, CONFIG, flat)
    for name, array in logical(tensors, CONFIG).items():
        np.testing.assert_array_equal(opened.weights[name].load(None), array)
    stored = opened.weights[f"{LAYER}.self_attn.embed_q.weight"]
    np.testing.assert_array_equal(stored.load(4), logical(tensors, CONFIG)[stored.name][4])


def test_gate_and_up_in_one_tensor(tmp_path, tensors):
    merged = to_gguf_tensors(tensors, CONFIG)
    for block in (1, 2, 3):
        pair = [merged.pop(f"blk.{block}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        merged[f"blk.{block}.ffn_gate_up_exps.weight"] = np.concatenate(pair, axis=1)
    opened = write_and_open(tmp_path, CONFIG, merged)
    expected = logical(tensors, CONFIG)
    assert set(opened.weights) == set(expected)
    for part in ("gate", "up"):
        stored = opened.weights[f"{LAYER}.mlp.switch_mlp.{part}_proj.weight"]
        np.testing.assert_array_equal(stored.load(None), expected[stored.name])
        np.testing.assert_array_equal(stored.load(6), expected[stored.name][6])


def test_a_tensor_of_another_model_is_named(tmp_path, tensors):
    foreign = {"blk.1.attn_k.weight": np.ones((2, 2), np.float32), "blk.01.ffn_norm.weight": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match=r"2 tensors .* does not have: blk\.1\.attn_k\.weight, blk\.01\.ffn_norm"):
        write_and_open(tmp_path, CONFIG, to_gguf_tensors(tensors, CONFIG) | foreign)


# Sizes that the blocks of every type divide.
WIDE = small_mtp_config(
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=256,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=256,
    v_head_dim=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=3,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    vocab_size=64,
) | {"num_nextn_predict_layers": 0}
KINDS = sorted({t.name for t in GGML_TYPES.values()} - {"F32", "F16", "BF16", "F64", "Q8_1", "Q8_K", "Q1_0"})
KINDS = [kind for kind in KINDS if not re.fullmatch(r"I\d+", kind)]


@pytest.fixture(scope="module")
def wide():
    return to_gguf_tensors(random_tensors(WIDE, 3), WIDE)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_matrices_stacks_and_halves(tmp_path, wide, kind):
    names = ["token_embd.weight", *(f"blk.1.{n}.weight" for n in ("attn_q_b", "attn_k_b", "attn_v_b", "ffn_down_exps"))]
    replaced = {name: random_blocks(kind, wide[name].shape) for name in names}
    opened = write_and_open(tmp_path, WIDE, wide | replaced)
    for name, tensor in replaced.items():
        (stored,) = (s for s in opened.weights.values() if s.tensor_names == (name,))
        expected = gguf_dequantize(tensor)
        assert stored.shape == expected.shape
        assert stored.dtype == np.float32
        whole = stored.load(None)
        assert isinstance(whole, QuantizedTensor) == (stored.spec is not None)
        if stored.spec is not None:
            assert whole.spec == stored.spec
        np.testing.assert_array_equal(np.asarray(whole), expected)
        if len(stored.shape) == 3:
            np.testing.assert_array_equal(np.asarray(stored.load(1)), expected[1])
        elif stored.spec is not None:
            with pytest.raises(IndexError, match="no stack axis"):
                stored.load(1)


def test_half_of_a_quantized_pair_of_experts(tmp_path, wide):
    merged = dict(wide)
    for part in ("gate", "up"):
        del merged[f"blk.1.ffn_{part}_exps.weight"]
    both = random_blocks("Q4_K", (3, 512, 256))
    opened = write_and_open(tmp_path, WIDE, merged | {"blk.1.ffn_gate_up_exps.weight": both})
    for part, rows in (("gate", slice(0, 256)), ("up", slice(256, None))):
        stored = opened.weights[f"{LAYER}.mlp.switch_mlp.{part}_proj.weight"]
        np.testing.assert_array_equal(np.asarray(stored.load(None)), gguf_dequantize(both)[:, rows])
        np.testing.assert_array_equal(np.asarray(stored.load(2)), gguf_dequantize(both)[2, rows])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_plain_types(tmp_path, wide, kind):
    import gguf

    array = wide["output.weight"]
    raw = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
    opened = write_and_open(tmp_path, WIDE, wide | {"output.weight": (raw, kind) if kind == "BF16" else raw})
    stored = opened.weights["lm_head.weight"]
    assert stored.dtype.name == {"F16": "float16", "BF16": "bfloat16"}[kind]
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(stored.load(None).astype(np.float32), expected)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (np.ones((64, 256), np.float64), r"output\.weight is of type F64, which cannot be read; known are BF16, F16"),
        ((np.zeros((64, 36), np.uint8), "Q1_0"), r"output\.weight is of type Q1_0, which cannot be read"),
    ],
)
def test_types_that_no_weight_has(tmp_path, wide, tensor, words):
    with pytest.raises(CheckpointError, match=words):
        write_and_open(tmp_path, WIDE, wide | {"output.weight": tensor})


def test_a_quantized_vector_is_refused(tmp_path, wide):
    with pytest.raises(CheckpointError, match=r"output_norm\.weight is a vector of type Q8_0"):
        write_and_open(tmp_path, WIDE, wide | {"output_norm.weight": random_blocks("Q8_0", (256,))})


def test_the_package_is_asked_for_when_opening(tmp_path, wide, monkeypatch):
    import sys

    path = write_gguf(
        tmp_path / "m.gguf",
        wide | {"output.weight": random_blocks("IQ3_S", (64, 256))},
        architecture_fields(WIDE),
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'output\.weight is of type IQ3_S, .* pip install "glm-jax\[gguf\]"'):
        open_gguf(path)


def test_one_expert_reads_no_other(tmp_path, wide, monkeypatch):
    from glm_jax.checkpoint.formats.gguf import weights

    name = "blk.1.ffn_up_exps.weight"
    opened = write_and_open(tmp_path, WIDE, wide | {name: random_blocks("Q5_K", wide[name].shape)})
    seen = []
    monkeypatch.setattr(weights, "repack_blocks", lambda raw, kind, _: seen.append(raw.shape))
    opened.weights[f"{LAYER}.mlp.switch_mlp.up_proj.weight"].load(1)
    assert seen == [(256, 176)]
