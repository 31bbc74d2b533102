"""Exports the trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from glm_jax.checkpoint import save
from glm_jax.config import Config

WEIGHTS = "model.safetensors"


def cast_to_stored_dtypes(params: dict[str, Any]) -> dict[str, Any]:
    """Casts parameters to the dtypes of the folder: bfloat16, and float32 for router biases."""

    def cast(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        return value if path[-1].key == "router_bias" else value.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, params)


def export_hf_folder(folder: Path, cfg: Config, params: Any, tokenizer: Tokenizer) -> None:
    """Writes config, generation config, tokenizer and weights; other files in the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sharded = Path(scratch) / "model"
        save(sharded, cfg, cast_to_stored_dtypes(params), to="safetensors")
        tensors = {}
        for path in sorted(sharded.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        (folder / "config.json").write_bytes((sharded / "config.json").read_bytes())
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "generation_config.json", _generation_config(cfg))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(cfg))


def _generation_config(cfg: Config) -> dict[str, Any]:
    # At temperature 1 the text of a model this small loses its thread.
    return {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "eos_token_id": list(cfg.eos_token_ids),
        "pad_token_id": cfg.pad_token_id,
    }


def _tokenizer_config(cfg: Config) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.max_position_embeddings,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
