"""The prediction layer, which transformers does not have, against a block of transformers with its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Glm4MoeLiteConfig

from glm_jax.checkpoint import load
from tests.builders.hf_checkpoints import Tensors, random_tensors, write_checkpoint
from tests.builders.hf_configs import HfConfig, odd_size_config
from tests.builders.jitted_model import JittedModel, is_close, random_tokens
from tests.parity import hf_models

LENGTH = 16


@pytest.fixture(params=[False, True], ids=["shared_table", "own_table"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[HfConfig, Tensors, Path]:
    config = odd_size_config(num_hidden_layers=2)
    tensors = random_tensors(config, 60, own_mtp=request.param)
    return config, tensors, write_checkpoint(tmp_path, config, tensors)


def test_draft(checkpoint: tuple[HfConfig, Tensors, Path]) -> None:
    """transformers runs the main model, then a one-layer model with the prediction layer's block, norm and head."""
    config, tensors, folder = checkpoint
    cfg, params, _ = load(folder, dtype="float32")
    ids, ours = random_tokens(config, 2, LENGTH + 1), JittedModel(cfg, params)
    main = hf_models.load_model(folder)
    with torch.no_grad():
        hidden = main.model(torch.from_numpy(ids[:, :-1]).long()).last_hidden_state
        joined = join(tensors, config, hidden, torch.from_numpy(ids[:, 1:]).long())
        expected = one_block(tensors, config, folder / "block")(inputs_embeds=joined).logits.numpy()
    assert is_close(ours.apply(ids[:, :-1], method="hidden")[0], hidden.numpy())
    logits, _, _ = ours.apply(hidden.numpy(), ids[:, 1:], method="draft")
    assert is_close(logits, expected)


def join(tensors: Tensors, config: HfConfig, hidden: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Applies eh_proj to the normalized embedding of the next token and the normalized hidden state."""
    own = {name.removeprefix("model.layers.2."): torch.from_numpy(np.array(t)) for name, t in tensors.items()}
    width, eps = (config["hidden_size"],), config["rms_norm_eps"]
    token = torch.nn.functional.rms_norm(own["embed_tokens.weight"][following], width, own["enorm.weight"], eps)
    state = torch.nn.functional.rms_norm(hidden, width, own["hnorm.weight"], eps)
    return torch.cat([token, state], dim=-1) @ own["eh_proj.weight"].T


def one_block(tensors: Tensors, config: HfConfig, folder: Path) -> Any:
    """Returns a model of transformers that consists of the prediction layer's block."""
    own = {n.removeprefix("model.layers.2."): t for n, t in tensors.items() if n.startswith("model.layers.2.")}
    parts = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")
    block = {f"model.layers.0.{name}": tensor for name, tensor in own.items() if name.startswith(parts)}
    block |= {"model.norm.weight": own["shared_head.norm.weight"], "lm_head.weight": own["shared_head.head.weight"]}
    block["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    sizes = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    alone = Glm4MoeLiteConfig(**{**sizes, "num_hidden_layers": 1, "mlp_layer_types": ["sparse"]})
    return hf_models.load_model(write_checkpoint(folder, json.loads(alone.to_json_string()), block))
