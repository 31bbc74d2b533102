"""GGUF files for tests, written with the gguf package: whole small models, or chosen tensors and fields.

`to_gguf_tensors` converts a Hugging Face checkpoint without our code, so it also checks our tensor names.
"""

import re
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from glm_jax.checkpoint.formats.gguf.ggml_types import GGML_TYPES
from tests.builders.hf_configs import odd_size_config

ARCHITECTURE = "deepseek2"
# Offsets of the float16 numbers in a block of each type; its other bytes may have any value.
FLOAT16_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
HF_TO_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "shared_head.head": "nextn.shared_head_head",
    "shared_head.norm": "nextn.shared_head_norm",
}


def small_mtp_config(**changes):
    """Returns a config with sizes that share no factors and with a prediction layer."""
    return odd_size_config(num_nextn_predict_layers=1, **changes)


def architecture_fields(config):
    """Returns the metadata that llama.cpp's converters write for a model."""
    layers, predicted = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    fields = {
        "block_count": layers + predicted,
        "nextn_predict_layers": predicted,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": rope,
        "rope.freq_base": float(config["rope_theta"]),
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,
    }
    own = {f"{ARCHITECTURE}.{key}": value for key, value in fields.items() if value is not None}
    first, *rest = config["eos_token_id"]
    stops = {"eos_token_id": first, **dict(zip(("eot_token_id", "eom_token_id"), rest, strict=False))}
    return own | {
        f"tokenizer.ggml.{key}": i for key, i in (stops | {"padding_token_id": config["pad_token_id"]}).items()
    }


def to_gguf_tensors(tensors, config, *, split_kv_b=True):
    """Converts a Hugging Face checkpoint to GGUF tensors; newer files split kv_b into its halves."""
    converted, experts = {}, {}
    for name, array in tensors.items():
        block, inner = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+?)(?:\.weight)?", name).groups()
        prefix = "" if block is None else f"blk.{block}."
        if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", inner):
            experts.setdefault(f"{prefix}ffn_{expert[2]}_exps.weight", []).append(array)
        elif inner == "self_attn.kv_b_proj" and split_kv_b:
            nope = config["qk_nope_head_dim"]
            heads = array.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            converted[f"{prefix}attn_k_b.weight"] = np.ascontiguousarray(heads[:, :nope].swapaxes(1, 2))
            converted[f"{prefix}attn_v_b.weight"] = np.ascontiguousarray(heads[:, nope:])
        else:
            converted[f"{prefix}{HF_TO_GGUF_NAMES[inner]}.{'bias' if inner.endswith('_bias') else 'weight'}"] = array
    return converted | {name: np.stack(arrays) for name, arrays in experts.items()}


def write_gguf(path: Path, tensors, fields, *, max_tensors_per_file=0, first_empty=False) -> Path:
    """Writes a GGUF file. A tensor is an array, or a pair of its bytes and the name of its type.

    `max_tensors_per_file` splits the model over several files; with `first_empty` the first has no tensors. Numbers
    have the types that the converters use.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURE, split_max_tensors=max_tensors_per_file, small_first_shard=first_empty)
    for key, value in fields.items():
        _add_field(writer, key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=Type[tensor[1]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer, key, value):
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def random_blocks(kind, shape, seed=0):
    """Returns random bytes of a tensor ``[*stack, O, I]`` whose scales are finite and of similar size, and its type."""
    rng = np.random.default_rng([seed, len(kind), *kind.encode()])
    types = {t.name: t for t in GGML_TYPES.values()}
    block = types[kind]
    count = int(np.prod(shape)) // block.block_size
    raw = rng.integers(0, 256, (count, block.type_size), np.uint8)
    for at in FLOAT16_OFFSETS.get(kind, ()):
        raw[:, at : at + 2] = (rng.standard_normal((count, 1)) / 50).astype("<f2").view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(0, 251, count)
    if kind == "IQ1_M":  # the high four bits of four 16-bit numbers hold the float16 scale
        raw[:, 55] = raw[:, 55] & 0x0F | 0x20
    return raw.reshape(*shape[:-1], -1), kind


def gguf_dequantize(tensor):
    """Dequantizes a pair of bytes and type with the gguf package."""
    raw, kind = tensor
    return gguf.quants.dequantize(raw, Type[kind])
