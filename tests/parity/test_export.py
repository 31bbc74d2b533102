"""Converted, saved and exported checkpoints load in transformers and give the same model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from convert.pipeline import convert_checkpoint
from glm_jax import checkpoint
from tests.builders import hf_checkpoints, hf_configs
from tests.checkpoint.assertions import assert_same_tensors
from tests.parity import hf_models
from tests.parity.fixtures import SavedCheckpoint

TOKENS = np.random.default_rng(0).integers(0, 131, (2, 17), dtype=np.int32)


def test_transformers_checkpoint_there_and_back(made: SavedCheckpoint, tmp_path: Path) -> None:
    """Every checkpoint that transformers saves comes back with its names, dtypes and bits, and the same logits."""
    convert_checkpoint(made.folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="safetensors")
    assert_same_tensors(made.folder, tmp_path / "back")
    tokens = TOKENS % made.config["vocab_size"]
    assert np.array_equal(
        hf_models.compute_logits(hf_models.load_model(tmp_path / "back"), tokens),
        hf_models.compute_logits(made.hf_model, tokens),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_load_without_help(tmp_path: Path, dtype: torch.dtype) -> None:
    """`from_pretrained` finds the class, the dtype and every tensor, and leaves only the prediction layer aside."""
    config = hf_configs.odd_size_config()
    name = str(dtype).removeprefix("torch.")
    tensors = hf_checkpoints.random_tensors(
        config, 0, dtype=hf_checkpoints.BFLOAT16 if name == "bfloat16" else np.float32
    )
    source = hf_checkpoints.write_checkpoint(tmp_path / "hf", {**config, "dtype": name}, tensors)
    cfg, params, info = checkpoint.load(source, dtype=name)
    checkpoint.save(tmp_path / "out", cfg, params, origin=info, to="safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(key.startswith("model.layers.3.") for key in report["unexpected_keys"])
    assert model.dtype == dtype
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 3
    before = hf_models.load_model(source, dtype).state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_export_of_a_config_without_our_keys(tmp_path: Path) -> None:
    """The export restores the keys that transformers drops from its configs, so that serving engines can read it."""
    config = hf_configs.from_scratch_config(**hf_configs.ODD_SIZES)
    source = hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(config, 0))
    convert_checkpoint(source, tmp_path / "out", to="safetensors")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["first_k_dense_replace"] == 1
    assert written["mlp_layer_types"] == ["dense", "sparse", "sparse"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10007.0
    shutil.copy(tmp_path / "out" / "config.json", source / "config.json")
    assert np.array_equal(
        hf_models.compute_logits(hf_models.load_model(tmp_path / "out"), TOKENS),
        hf_models.compute_logits(hf_models.load_model(source), TOKENS),
    )
