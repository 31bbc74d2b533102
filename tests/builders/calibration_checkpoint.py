"""A small model with the miniature's tokenizer."""

import json
import shutil
from pathlib import Path

import glm_jax
from tests.builders import hf_checkpoints as checkpoints
from tests.builders import hf_configs as spellings

TINY = Path(glm_jax.__file__).parent / "tiny"


def calibratable(folder, layers=2):
    """A random checkpoint that knows the miniature's tokens; its widths have groups of 8 and more."""
    config = spellings.odd(
        vocab_size=2048, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=layers
    )
    config |= {"eos_token_id": json.loads((TINY / "config.json").read_text())["eos_token_id"], "pad_token_id": None}
    tensors = checkpoints.random_tensors(config, 0, dtype=checkpoints.BFLOAT16)
    source = checkpoints.write(folder / "hf", config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, source / name)
    return source
