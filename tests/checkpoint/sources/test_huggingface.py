"""Hugging Face folders as sources: copies, missing prediction layers, odd dtypes, quantized formats."""

import json

import ml_dtypes
import numpy as np
import pytest

from glm_jax.checkpoint.sources.build import build_array
from glm_jax.checkpoint.sources.huggingface import HuggingFaceSource
from glm_jax.errors import CheckpointError, ConfigError
from tests.builders import hf_checkpoints, hf_configs

CONFIG = hf_configs.odd_size_config()
L47 = f"model.layers.{CONFIG['num_hidden_layers']}"
EMBED, HEAD = f"{L47}.embed_tokens.weight", f"{L47}.shared_head.head.weight"


def open_folder(folder, tensors, config=CONFIG):
    return HuggingFaceSource(hf_checkpoints.write_checkpoint(folder, config, tensors))


def leaf(source, part, name):
    return next(leaf for leaf in source.layout()[part] if leaf.name == name)


def array(source, part, name):
    return build_array(source, leaf(source, part, name))


def test_arrays_are_views_of_the_files(tmp_path):
    source = open_folder(tmp_path, hf_checkpoints.random_tensors(CONFIG, 0))
    assert not array(source, "rest", "embed").flags.owndata
    _, first = next(iter(source.iter_chunks(leaf(source, "layer-00001", "moe.gate"))))
    assert first.shape[0] == 1
    assert not first.flags.owndata


def test_experts_can_be_read_alone(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    source = open_folder(tmp_path, tensors)
    ((row, piece),) = source.iter_chunks(leaf(source, "layer-00002", "moe.down"), 3, 4)
    assert row == 3
    assert np.array_equal(piece[0], tensors["model.layers.2.mlp.experts.3.down_proj.weight"])


def test_fused_experts_are_the_same_experts(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    plain = open_folder(tmp_path / "plain", tensors)
    for layer in (1, 2, 3):
        prefix = f"model.layers.{layer}.mlp.experts"
        take = {
            part: np.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(7)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = np.concatenate([take["gate"], take["up"]], axis=1)
        tensors[f"{prefix}.down_proj"] = take["down"]
    fused = open_folder(tmp_path / "fused", tensors)
    for part, members in plain.layout().items():
        for member in members:
            assert np.array_equal(build_array(plain, member), build_array(fused, leaf(fused, part, member.name)))


def test_prediction_copies_are_dropped_and_remembered(tmp_path):
    source = open_folder(tmp_path, hf_checkpoints.random_tensors(CONFIG, 0))
    assert not source.cfg.mtp_own_embeddings
    assert source.info.original.mtp_copies == ("embed", "head")
    assert source.info.notes == ()


@pytest.mark.parametrize("missing", [[EMBED], [HEAD], [EMBED, HEAD]])
def test_absent_prediction_copies(tmp_path, missing):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    for name in missing:
        del tensors[name]
    source = open_folder(tmp_path, tensors)
    assert not source.cfg.mtp_own_embeddings
    assert len(source.info.original.mtp_copies) == 2 - len(missing)


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_one_different_bit_makes_own_embeddings(tmp_path, name):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    changed = tensors[name].copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    tensors[name] = changed
    source = open_folder(tmp_path, tensors)
    assert source.cfg.mtp_own_embeddings
    assert np.array_equal(array(source, "mtp", "embed"), tensors[EMBED])
    assert np.array_equal(array(source, "mtp", "head"), tensors[HEAD])


def test_negative_zero_is_a_difference(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.embed_tokens.weight"][0, 0] = 0.0
    tensors[EMBED] = tensors["model.embed_tokens.weight"].copy()
    tensors[EMBED][0, 0] = -0.0
    assert open_folder(tmp_path, tensors).cfg.mtp_own_embeddings


def test_own_head_with_the_models_embedding(tmp_path):
    """The copy that is not there is the model's own."""
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, own_mtp=True)
    del tensors[EMBED]
    source = open_folder(tmp_path, tensors)
    assert source.cfg.mtp_own_embeddings
    assert np.array_equal(array(source, "mtp", "embed"), tensors["model.embed_tokens.weight"])
    assert np.array_equal(array(source, "mtp", "head"), tensors[HEAD])


def test_prediction_layer_missing(tmp_path):
    """Pruned relatives drop the layer and keep the key."""
    tensors = {n: t for n, t in hf_checkpoints.random_tensors(CONFIG, 0).items() if not n.startswith(L47)}
    source = open_folder(tmp_path, tensors)
    assert source.cfg.num_nextn_predict_layers == 0
    assert "has no tensors here" in source.info.notes[0]


def test_prediction_layer_that_the_config_does_not_mention(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    source = open_folder(tmp_path, tensors, hf_configs.odd_size_config(num_nextn_predict_layers=0))
    assert source.cfg.num_nextn_predict_layers == 1
    assert "although config.json does not say so" in source.info.notes[0]


def test_half_a_prediction_layer(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    del tensors[f"{L47}.enorm.weight"]
    with pytest.raises(CheckpointError, match=rf"1 missing: {L47}.enorm.weight"):
        open_folder(tmp_path, tensors)


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(tmp_path, with_head):
    config = hf_configs.odd_size_config(tie_word_embeddings=True)
    tensors = hf_checkpoints.random_tensors(config, 0)
    if with_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = open_folder(tmp_path, tensors, config)
    assert source.info.original.head_copy is with_head
    assert {leaf.name for leaf in source.layout()["rest"]} == {"embed", "norm"}
    assert not source.cfg.mtp_own_embeddings


def test_tied_embeddings_with_another_head(tmp_path):
    config = hf_configs.odd_size_config(tie_word_embeddings=True)
    tensors = hf_checkpoints.random_tensors(config, 0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_folder(tmp_path, tensors, config)


def test_untied_model_needs_its_head(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        open_folder(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_router_bias_is_float32_whatever_the_file_has(tmp_path, dtype):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, dtype=dtype)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].astype(dtype)
    source = open_folder(tmp_path, tensors)
    bias = array(source, "layer-00001", "moe.router_bias")
    assert bias.dtype == np.float32
    assert np.array_equal(bias, tensors[name].astype(np.float32))
    remembered = {} if dtype == np.float32 else {"layer-00001/moe.router_bias": np.dtype(dtype).name}
    assert source.info.original.dtypes == remembered
    assert source.info.dtype == np.dtype(dtype).name


def test_experts_of_two_dtypes_keep_every_bit(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, dtype=ml_dtypes.bfloat16)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    source = open_folder(tmp_path, tensors)
    stacked = array(source, "layer-00001", "moe.up")
    assert stacked.dtype == np.float32
    assert np.array_equal(stacked[2], tensors[name].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("self_attn.o_proj.weight_packed", np.int32, "self_attn.o_proj"),
        ("self_attn.o_proj.qweight", np.int32, "self_attn.o_proj"),
        ("self_attn.o_proj.weight_scale_inv", np.float32, "self_attn.o_proj"),
        ("self_attn.o_proj.scales", np.float16, "self_attn.o_proj"),
    ],
)
def test_part_of_a_quantized_weight_names_its_module(tmp_path, name, dtype, words):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    tensors[f"model.layers.1.{name}"] = np.zeros((4, 4), dtype)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_folder(tmp_path, tensors)
    assert "given more than once" not in str(caught.value)


def test_bare_fp8_weights(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is F8_E4M3"):
        open_folder(tmp_path, tensors)


def test_null_quantization_config_is_none(tmp_path):
    open_folder(tmp_path, hf_checkpoints.random_tensors(CONFIG, 0), {**CONFIG, "quantization_config": None})


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 99_999])
def test_broken_config(tmp_path, text):
    folder = hf_checkpoints.write_checkpoint(tmp_path, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        HuggingFaceSource(folder)


def test_other_architecture(tmp_path):
    with pytest.raises(ConfigError, match="llama"):
        open_folder(tmp_path, hf_checkpoints.random_tensors(CONFIG, 0), {**CONFIG, "model_type": "llama"})


def test_no_config(tmp_path):
    folder = hf_checkpoints.write_checkpoint(tmp_path, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HuggingFaceSource(folder)


def test_another_vocabulary_is_a_list_of_wrong_shapes(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    with pytest.raises(CheckpointError) as caught:
        open_folder(tmp_path, tensors, {**CONFIG, "vocab_size": 150})
    assert "model.embed_tokens.weight is [131, 40], the config needs [150, 40]" in str(caught.value)
    assert "lm_head.weight is [131, 40]" in str(caught.value)


def test_config_is_kept_whole(tmp_path):
    source = open_folder(tmp_path, hf_checkpoints.random_tensors(CONFIG, 0))
    assert source.hf_config == json.loads((tmp_path / "config.json").read_text())
