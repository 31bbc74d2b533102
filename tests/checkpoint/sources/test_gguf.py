"""A GGUF file as a model: the values of its blocks in the right places, and everything that takes a model takes it."""

import json

import gguf
import jax
import numpy as np
import pytest

import glm_jax
from convert.pipeline import convert_checkpoint
from glm_jax import checkpoint, generate
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.errors import CheckpointError
from glm_jax.plan.__main__ import main as plan_main
from glm_jax.weights import QuantizedTensor
from glm_jax.weights.params import leaves_with_path
from tests.builders.gguf_files import (
    architecture_fields,
    gguf_dequantize,
    small_mtp_config,
    to_gguf_tensors,
    write_gguf,
)
from tests.builders.hf_checkpoints import random_tensors, to_params
from tests.checkpoint.formats.gguf.test_tokenizer import original, vocabulary_fields  # noqa: F401

ROWS = 420
CONFIG = small_mtp_config(
    vocab_size=ROWS,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    v_head_dim=32,
)
TYPE = gguf.GGMLQuantizationType.Q8_0


def packed(name, array):
    """Matrices in Q8_0, all else in float32, as the converters leave norms and routers."""
    plain = array.ndim < 2 or "ffn_gate_inp" in name
    return array.astype(np.float32) if plain else (gguf.quants.quantize(array.astype(np.float32), TYPE), "Q8_0")


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):  # noqa: F811
    tensors = {name: packed(name, array) for name, array in to_gguf_tensors(random_tensors(CONFIG, 0), CONFIG).items()}
    fields = architecture_fields(CONFIG) | vocabulary_fields(original, ROWS)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tensors, fields), tensors


def hugging_face(tensors):
    """The dequantized tensors under the names and in the shapes of the original, by hand."""
    values = {name: gguf_dequantize(t) if isinstance(t, tuple) else t for name, t in tensors.items()}
    return {name: _turned(name, _gguf_name(name), values) for name in random_tensors(CONFIG, 0)}


def _gguf_name(name):
    if ".mlp.experts." in name:
        layer, part = name.split(".")[2], name.split(".")[-2].removesuffix("_proj")
        return f"blk.{layer}.ffn_{part}_exps.weight"
    if "kv_b_proj" in name:
        return f"blk.{name.split('.')[2]}.attn_"
    (key,) = to_gguf_tensors({name: np.zeros((1, 1))}, CONFIG, split_kv_b=False)
    return key


def _turned(name, made, values):
    if ".mlp.experts." in name:
        return values[made][int(name.split(".")[5])]
    if "kv_b_proj" in name:
        halves = [values[f"{made}k_b.weight"].swapaxes(1, 2), values[f"{made}v_b.weight"]]
        return np.concatenate(halves, axis=1).reshape(-1, CONFIG["kv_lora_rank"])
    return values[made]


def test_every_value_is_the_block_s(file):
    path, tensors = file
    cfg, params, info = checkpoint.load(path, dtype="float32")
    assert info.kind == "gguf"
    expected = dict(leaves_with_path(to_params(hugging_face(tensors), cfg)))
    for name, leaf in leaves_with_path(params):
        assert np.array_equal(np.asarray(leaf, np.float32), expected[name]), name
    held = {name[-1]: leaf for name, leaf in leaves_with_path(params) if isinstance(leaf, QuantizedTensor)}
    assert held["gate"].spec.block == (1, 32)
    assert held["k_b"].spec.block == (32, 1)  # stored the other way round
    assert held["v_b"].spec.kind == "int8"
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < 1.2 * path.stat().st_size


def test_a_conversion_keeps_every_value(file, tmp_path):
    path, _ = file
    convert_checkpoint(path, tmp_path / "out")
    ours, again = checkpoint.load(path, dtype="float32"), checkpoint.load(tmp_path / "out", dtype="float32", check=True)
    assert again[0] == ours[0]
    for (name, a), (_, b) in zip(leaves_with_path(again[1]), leaves_with_path(ours[1]), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), name
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_model_to_use(file, capsys):
    path, _ = file
    llm = glm_jax.LLM.load(path)
    done = llm.generate("hello", max_tokens=4, temperature=0)
    assert done.completion_tokens == 4
    assert generate.main(["hello", "--model", str(path), "--max-tokens", "4", "--temperature", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == list(done.token_ids)
    assert plan_main(["--model", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["weight_bytes"] + planned["mtp_bytes"] == sum(x.nbytes for x in jax.tree.leaves(llm.params))


def test_the_folder_of_a_file_and_the_file_are_the_same(file):
    path, _ = file
    assert open_source(path.parent).fingerprint() == open_source(path).fingerprint()


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file, but long enough to look like one")
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        glm_jax.LLM.load(tmp_path / "model.gguf")
