"""Builds the content of a ``config.json`` from the metadata fields of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.gguf.header import MetadataValue, read_uint
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.errors import CheckpointError

ARCHITECTURE = "deepseek2"
_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func
# Fields that do not affect the computation, or repeat other fields and the tensors.
_IGNORED_FIELDS = frozenset(
    """attention.causal attention.key_length attention.value_length rope.scaling.original_context_length
    rope.scaling.finetuned rope.scaling.yarn_log_multiplier tensor_data_layout""".split()
)
_UINT_FIELDS = {
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.kv_lora_rank": "kv_lora_rank",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "leading_dense_block_count": "first_k_dense_replace",
    "rope.dimension_count": "qk_rope_head_dim",
    "context_length": "max_position_embeddings",
}
# Field -> config key, and llama.cpp's value for an absent field.
_OPTIONAL_UINT_FIELDS: dict[str, tuple[str, int]] = {
    "expert_shared_count": ("n_shared_experts", 0),
    "expert_group_count": ("n_group", 1),
    "expert_group_used_count": ("topk_group", 1),
}
_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def build_hf_config(
    fields: Mapping[str, MetadataValue], tensors: Mapping[str, tuple[int, ...]], file: str
) -> dict[str, Any]:
    """Builds a dictionary for :meth:`glm_jax.config.Config.from_hf`.

    Args:
        fields: Metadata fields of the file.
        tensors: Shape of each tensor by its name in the file. They decide about the prediction layer and tied
            embeddings, and give the vocabulary size if the fields do not.
        file: File name for error messages.

    Raises:
        CheckpointError: For another architecture, missing or impossible fields, and fields that require a computation
            which GLM-4.7-Flash does not have (softmax routing, rope scaling, anything unknown).
    """
    reader = _MetadataReader(fields, file)
    config: dict[str, Any] = {name: reader.get_uint(key) for key, name in _UINT_FIELDS.items()}
    config |= {name: reader.get_uint(key, default) for key, (name, default) in _OPTIONAL_UINT_FIELDS.items()}
    blocks, mtp_layers = reader.get_uint("block_count"), reader.get_uint("nextn_predict_layers", 0)
    layers = blocks - mtp_layers
    has_mtp_tensors = any(name.startswith(f"blk.{layers}.") for name in tensors)
    config |= {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": mtp_layers if has_mtp_tensors else 0,
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": reader.get_uint("attention.q_lora_rank", 0) or None,
        "rms_norm_eps": reader.get_float("attention.layer_norm_rms_epsilon"),
        "rope_theta": reader.get_float("rope.freq_base", 10_000.0),
        "routed_scaling_factor": reader.get_float("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": reader.get_bool("expert_weights_norm", False),
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": _vocab_size(reader, tensors),
        "eos_token_id": read_eos_token_ids(fields, file),
        "pad_token_id": read_token_id(fields, "tokenizer.ggml.padding_token_id", file),
    }
    config |= _head_sizes(reader, config, tensors)
    _check_routing(reader, config)
    _check_rope(reader)
    reader.reject_unread()
    return config


class _MetadataReader:
    """Reads the architecture's metadata fields and remembers which of them have been read."""

    def __init__(self, fields: Mapping[str, MetadataValue], file: str) -> None:
        architecture = fields.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(
                f"{file} holds a model of architecture {printable(repr(architecture))}; "
                f"GGUF files of GLM-4.7-Flash have {ARCHITECTURE!r}"
            )
        self._fields, self._file = fields, file
        self._read_keys: set[str] = set(_IGNORED_FIELDS)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {problem}")

    def get(self, key: str) -> MetadataValue | None:
        self._read_keys.add(key)
        return self._fields.get(f"{ARCHITECTURE}.{key}")

    def get_uint(self, key: str, default: int | None = None) -> int:
        self._read_keys.add(key)
        return read_uint(self._fields, f"{ARCHITECTURE}.{key}", self._file, default)

    def get_float(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self._file} lacks the field {ARCHITECTURE}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{ARCHITECTURE}.{key} must be a number, not {printable(repr(value))}")
        # The file stores float32. Its shortest decimal is the intended 1e-5, its exact value is 9.99999974e-06.
        return float(str(np.float32(value)))

    def get_bool(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(f"{ARCHITECTURE}.{key} must be true or false, not {printable(repr(value))}")
        return default if value is None else value

    def reject_unread(self) -> None:
        prefix = f"{ARCHITECTURE}."
        # An unknown field that is zero, false or empty cannot change the computation.
        unknown = [
            key
            for key, value in self._fields.items()
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._read_keys and _is_nonzero(value)
        ]
        if unknown:
            raise self.error(
                f"fields that this version does not understand: {format_names([*map(printable, unknown)])}"
            )


def _is_nonzero(value: MetadataValue) -> bool:
    return bool(np.any(value)) if isinstance(value, np.ndarray) else bool(value)


def _vocab_size(reader: _MetadataReader, tensors: Mapping[str, tuple[int, ...]]) -> int:
    rows = tensors.get("token_embd.weight", (0,))[0]
    return reader.get_uint("vocab_size", rows)


def _head_sizes(
    reader: _MetadataReader, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    heads = config["num_attention_heads"]
    if reader.get_uint("attention.head_count_kv", heads) not in (1, heads):
        raise reader.error(f"attention.head_count_kv must be 1 or {heads}, the number of heads")
    key_dim = reader.get_uint("attention.key_length_mla", 0)
    value_dim = reader.get_uint("attention.value_length_mla", 0)
    if not key_dim or not value_dim:
        # The first files of this family keep kv_b whole and give the sizes of expanded heads under the general names.
        if any(name.endswith(".attn_k_b.weight") for name in tensors):
            raise reader.error("attention.key_length_mla and value_length_mla are missing: get a newer file")
        key_dim, value_dim = reader.get_uint("attention.key_length"), reader.get_uint("attention.value_length")
    rope_dim = config["qk_rope_head_dim"]
    if key_dim <= rope_dim:
        raise reader.error(f"a key of {key_dim} values cannot contain the {rope_dim} of rope.dimension_count")
    return {"qk_nope_head_dim": key_dim - rope_dim, "v_head_dim": value_dim}


def _check_routing(reader: _MetadataReader, config: Mapping[str, Any]) -> None:
    # The field is usually absent, because the original config.json does not name the function either.
    gating = reader.get_uint("expert_gating_func", _SIGMOID)
    if gating != _SIGMOID:
        name = " (softmax)" if gating == _SOFTMAX else ""
        raise reader.error(
            f"expert_gating_func is {gating}{name}, but GLM-4.7-Flash routes with the sigmoid: files made before "
            "21 January 2026 are wrong in this. Download a newer file, or correct this one "
            "with `gguf-set-metadata FILE deepseek2.expert_gating_func 2` of the gguf package"
        )
    width = config["n_shared_experts"] * config["moe_intermediate_size"]
    if reader.get_uint("expert_shared_feed_forward_length", width) not in (0, width):
        raise reader.error(f"expert_shared_feed_forward_length must be {width}, as the other fields have it")


def _check_rope(reader: _MetadataReader) -> None:
    kind = reader.get("rope.scaling.type")
    factors = {key: reader.get(f"rope.scaling.{key}") for key in ("factor", "attn_factor")}
    if kind not in (None, "", "none") or any(value not in (None, 0, 1) for value in factors.values()):
        raise reader.error(
            f"rope scaling ({printable(repr(kind))}) is not supported: GLM-4.7-Flash has none "
            "(its context is 202,752 tokens without it)"
        )


def read_eos_token_ids(fields: Mapping[str, MetadataValue], file: str) -> list[int]:
    """Ids of all tokens that end a response: end of text, end of turn, and end of a message with tool calls.

    Raises:
        CheckpointError: If one of the fields is not a token id.
    """
    ids = [read_token_id(fields, key, file) for key in _EOS_KEYS]
    more_ids = fields.get("tokenizer.ggml.eos_token_ids")
    if isinstance(more_ids, np.ndarray) and more_ids.dtype.kind in "iu":
        ids += more_ids.tolist()
    return list(dict.fromkeys(i for i in ids if i is not None and i >= 0))


def read_token_id(fields: Mapping[str, MetadataValue], key: str, file: str) -> int | None:
    """Token id in a metadata field, or None if the field is absent.

    Raises:
        CheckpointError: If the field is not a token id.
    """
    return read_uint(fields, key, file) if key in fields else None
