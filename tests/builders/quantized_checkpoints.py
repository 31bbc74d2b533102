"""Small quantised checkpoints of every format on disk, beside plain ones with the values that they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.builders.hf_checkpoints import Tensors, random_tensors, write
from tests.builders.hf_configs import HfConfig, original
from tests.builders.quantized_formats import MLX, Format, linear, pack_mlx, pack_tensors

# Multiples of the groups of 32 and of four devices, and different wherever they can be.
SIZES: HfConfig = {
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


class Pair(NamedTuple):
    """Two folders of one model."""

    config: HfConfig
    packed: Path
    plain: Path
    values: Tensors


def make(
    folder: Path, form: Format, kinds: Sequence[str] = ("experts",), spelling: Any = original, **changes: Any
) -> Pair:
    """A checkpoint whose matrices of these kinds are packed in a format."""
    config = spelling(**{**SIZES, **changes})
    tensors = random_tensors({"num_nextn_predict_layers": 0, **config}, sum(map(ord, form.name)))
    if form is MLX:
        packed, plain = pack_mlx(tensors, config)
    else:
        packed, plain = pack_tensors(tensors, form, lambda name: linear(name, kinds))
    described = {**config, form.key: dict(form.config)}
    return Pair(config, write(folder / "packed", described, packed), write(folder / "plain", config, plain), plain)
