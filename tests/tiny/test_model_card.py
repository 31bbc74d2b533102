"""The published folder: size, consistent metrics, and the held-out tasks."""

import json
import platform
import re

import jax.numpy as jnp
import pytest

from examples.tiny_recipe.corpus import library_files, split_held_out
from examples.tiny_recipe.held_out_tasks import evaluation_conversations, to_record
from examples.tiny_recipe.model_card import render_card
from examples.tiny_recipe.schedule import tiny_config
from glm_jax.checkpoint import load
from glm_jax.config import Config

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def metrics(tiny_folder):
    return json.loads((tiny_folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def text(tiny_folder):
    return (tiny_folder / "README.md").read_text()


def test_the_folder_is_complete_and_small(tiny_folder):
    names = {path.name for path in tiny_folder.iterdir()}
    assert names >= {
        *("README.md", "config.json", "generation_config.json", "heldout_chat.jsonl", "metrics.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.png"),
    }
    assert sum(path.stat().st_size for path in tiny_folder.iterdir()) <= MAX_BYTES


def test_the_config_is_the_recipe_s(tiny_folder):
    cfg = Config.from_hf(json.loads((tiny_folder / "config.json").read_text()))
    assert cfg == tiny_config()
    for width in (cfg.hidden_size, cfg.intermediate_size, cfg.q_lora_rank, cfg.num_attention_heads * cfg.v_head_dim):
        assert width % 128 == 0
    assert (cfg.moe_intermediate_size, cfg.kv_lora_rank, cfg.qk_rope_head_dim) == (128, 128, 32)
    assert (cfg.num_attention_heads, cfg.num_experts_per_tok, cfg.num_nextn_predict_layers) == (4, 4, 1)
    assert cfg.n_routed_experts in (8, 16)
    assert cfg.vocab_size % 256 == 0


def test_the_weights_are_trained_and_finite(metrics):
    cfg, params, _ = load("tiny", check=True)
    biases = params["runs"]["1"]["moe"]["router_bias"]
    assert biases.dtype == jnp.float32
    assert (biases != 0).any()
    assert (params["mtp"]["moe"]["router_bias"] != 0).any()
    assert params["embed"].dtype == jnp.bfloat16
    assert metrics["run"]["parameters"] == 5_788_448
    assert cfg == tiny_config()


def test_the_metrics_are_good_enough(metrics):
    assert metrics["bits_per_byte"] < 1.6 < metrics["bits_per_byte_xz"]
    assert metrics["chat"]["tasks"] >= 500
    assert metrics["chat"]["exact_match"] > 0.8
    assert metrics["chat"]["well_formed_calls"] > 0.95
    assert metrics["mtp_acceptance"]["held_out_text"] > 0.5


def test_the_card_states_the_metrics(metrics, text):
    for figure in (
        f"**{metrics['bits_per_byte']:.3f}**",
        f"| {metrics['bits_per_byte_xz']:.3f} |",
        f"**{metrics['chat']['exact_match']:.1%}**",
        f"| {metrics['chat']['well_formed_calls']:.1%} |",
        f"| {metrics['mtp_acceptance']['held_out_text']:.1%} |",
        f"Python {metrics['python']}",
        f"{metrics['run']['tokens']:,} tokens",
        metrics["run"]["command"],
    ):
        assert figure in text


def test_the_card_lists_this_library_s_held_out_files(metrics, text):
    listed = re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.MULTILINE)
    assert len(listed) == metrics["held_out_files"]
    if platform.python_version() == metrics["python"]:
        held_out = split_held_out(library_files())[1]
        assert listed == [(file.sha256, file.name) for file in held_out]
        assert render_card(metrics, held_out) == text


def test_the_tasks_are_the_held_out_ones(tiny_folder, metrics):
    lines = (tiny_folder / "heldout_chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [to_record(item) for item in evaluation_conversations()]
    assert len(lines) == metrics["chat"]["tasks"]
