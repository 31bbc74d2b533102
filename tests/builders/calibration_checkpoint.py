"""A small checkpoint with the miniature's tokenizer, for calibration."""

import json
import shutil
from pathlib import Path

import glm_jax
from tests.builders import hf_checkpoints, hf_configs

TINY_FOLDER = Path(glm_jax.__file__).parent / "tiny"


def write_calibration_checkpoint(folder, layers=2):
    """Writes a random checkpoint with the miniature's vocabulary; its widths divide into groups of 8 or more."""
    config = hf_configs.odd_size_config(
        vocab_size=2048, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=layers
    )
    config |= {
        "eos_token_id": json.loads((TINY_FOLDER / "config.json").read_text())["eos_token_id"],
        "pad_token_id": None,
    }
    tensors = hf_checkpoints.random_tensors(config, 0, dtype=hf_checkpoints.BFLOAT16)
    source = hf_checkpoints.write_checkpoint(folder / "hf", config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY_FOLDER / name, source / name)
    return source
