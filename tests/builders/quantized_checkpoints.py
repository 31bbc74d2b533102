"""Small quantized checkpoints of every format, each with an unquantized checkpoint of the same values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.builders.hf_checkpoints import Tensors, random_tensors, write_checkpoint
from tests.builders.hf_configs import HfConfig, original_config
from tests.builders.quantized_formats import (
    MLX_FORMAT,
    QuantFormat,
    is_linear_weight,
    pack_checkpoint,
    pack_mlx_checkpoint,
)

# Multiples of groups of 32 and of four devices, and otherwise different.
QUANTIZABLE_SIZES: HfConfig = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10007.0,
    "eos_token_id": [2, 7],
    "pad_token_id": 2,
    "dtype": "float32",
}


class CheckpointPair(NamedTuple):
    """Folders of a quantized model, and of an unquantized model with the same values."""

    config: HfConfig
    quantized: Path
    dequantized: Path
    values: Tensors


def write_checkpoint_pair(
    folder: Path,
    form: QuantFormat,
    kinds: Sequence[str] = ("experts",),
    spelling: Any = original_config,
    **changes: Any,
) -> CheckpointPair:
    """Writes a checkpoint whose matrices of these kinds are packed in a format."""
    config = spelling(**{**QUANTIZABLE_SIZES, **changes})
    tensors = random_tensors({"num_nextn_predict_layers": 0, **config}, sum(map(ord, form.name)))
    if form is MLX_FORMAT:
        packed, plain = pack_mlx_checkpoint(tensors, config)
    else:
        packed, plain = pack_checkpoint(tensors, form, lambda name: is_linear_weight(name, kinds))
    described = {**config, form.key: dict(form.config)}
    return CheckpointPair(
        config,
        write_checkpoint(folder / "packed", described, packed),
        write_checkpoint(folder / "plain", config, plain),
        plain,
    )
