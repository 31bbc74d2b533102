"""Maps the tensors of a GGUF file to weights under the logical names of Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.formats.base import Array, StoredWeight
from glm_jax.checkpoint.formats.gguf.blocks import EXPANDED_TYPES, REPACKED_TYPES, expand_blocks, repack_blocks
from glm_jax.checkpoint.formats.gguf.ggml_types import GgmlType
from glm_jax.checkpoint.formats.gguf.header import GgufTensorInfo
from glm_jax.checkpoint.formats.gguf.split_files import LocatedTensor
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor

_NON_LAYER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_k_b.weight": "self_attn.embed_q.weight",
    "attn_v_b.weight": "self_attn.unembed_out.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.embed_tokens.weight": "embed_tokens.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.shared_head_head.weight": "shared_head.head.weight",
    "nextn.shared_head_norm.weight": "shared_head.norm.weight",
} | {
    f"ffn_{branch}{suffix}.weight": f"mlp.{prefix}{branch}_proj.weight"
    for branch in ("gate", "up", "down")
    for suffix, prefix in (("", ""), ("_exps", "switch_mlp."), ("_shexp", "shared_experts."))
}
_GATE_UP = "ffn_gate_up_exps.weight"  # the first half of the rows is gate, the second half is up
_KV_B = "attn_kv_b.weight"
_PER_HEAD = ("attn_k_b.weight", "attn_v_b.weight")
_LAYER_PATTERN = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)", re.DOTALL)

_PLAIN_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class _TensorLoader:
    """Loads a weight, or one entry of its leading axis.

    Attributes:
        located: Tensor that holds the weight.
        shape: Shape of the weight, which may differ from the tensor's shape.
        rows: Rows of each matrix that belong to the weight.
    """

    located: LocatedTensor
    shape: tuple[int, ...]
    rows: slice

    def __call__(self, index: int | None = None) -> Array | QuantizedTensor:
        info = self.located.info
        raw = self.located.split.tensor_bytes(info)
        if len(self.shape) > 1:
            raw = raw.reshape(*self._stored_shape(), info.row_bytes)[..., self.rows, :]
        dtype = _PLAIN_DTYPES.get(info.type.name)
        if dtype is not None:
            raw = raw.view(dtype)
        if index is not None:
            if dtype is None and len(self.shape) < 3:
                raise IndexError("a single matrix has no stack axis to index")
            raw = raw[index]
        return _decode_blocks(raw, info) if dtype is None else raw

    def _stored_shape(self) -> tuple[int, ...]:
        """Shape ``[*stack, O]`` of the tensor with all its rows, without the row bytes."""
        stack = self.shape[:-2]
        return (*stack, math.prod(self.located.info.shape[:-1]) // math.prod(stack))


def _decode_blocks(raw: Array, info: GgufTensorInfo) -> Array | QuantizedTensor:
    decode = repack_blocks if info.type.name in REPACKED_TYPES else expand_blocks
    return decode(raw, info.type, printable(info.name))


def named_weights(
    tensors: Mapping[str, LocatedTensor], config: Mapping[str, Any]
) -> tuple[dict[str, StoredWeight], list[str]]:
    """Finds the weights of a GGUF file.

    The logical names are those of Hugging Face checkpoints where these have the tensor. Stacked experts are called
    ``mlp.switch_mlp.*_proj.weight``, ``[E, O, I]``. The halves of ``kv_b`` are called ``self_attn.embed_q.weight``,
    ``[N, R, Hn]``, and ``self_attn.unembed_out.weight``, ``[N, Hv, R]``.

    Args:
        tensors: Tensors by their names in the file.
        config: Config that :func:`~glm_jax.checkpoint.formats.gguf.hf_config.build_hf_config` built from the same file.

    Returns:
        The weights by logical name, and notes for the user.

    Raises:
        CheckpointError: For tensors that this model does not have, and for unsupported tensor types.
    """
    redundant = {name for name in tensors if name.endswith(_KV_B) and _has_halves(name, tensors)}
    weights: dict[str, StoredWeight] = {}
    unknown: list[str] = []
    for name, located in tensors.items():
        if name in redundant:
            continue
        stored_weights = _stored_weights(name, located, config["num_attention_heads"])
        if not stored_weights:
            unknown.append(printable(name))
        weights |= {stored.name: stored for stored in stored_weights}
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors that GLM-4.7-Flash does not have: {format_names(unknown)}")
    _check_types(tensors)
    return weights, ["attn_kv_b is left out where the file has its halves as well"] if redundant else []


def _has_halves(name: str, tensors: Mapping[str, LocatedTensor]) -> bool:
    return all(name.removesuffix(_KV_B) + half in tensors for half in _PER_HEAD)


def _stored_weights(name: str, located: LocatedTensor, heads: int) -> list[StoredWeight]:
    """Weights that a tensor holds: usually one, two if gate and up are fused, none for an unknown name."""
    block = _LAYER_PATTERN.fullmatch(name)
    prefix, inner = (f"model.layers.{block[1]}.", block[2]) if block else ("", name)
    shape = located.info.shape
    if block and inner == _GATE_UP and len(shape) == 3 and shape[1] % 2 == 0:
        half = (shape[0], shape[1] // 2, shape[2])
        branches = (("gate", slice(None, half[1])), ("up", slice(half[1], None)))
        return [
            _stored_weight(f"{prefix}mlp.switch_mlp.{branch}_proj.weight", located, half, rows)
            for branch, rows in branches
        ]
    logical = (_LAYER_NAMES if block else _NON_LAYER_NAMES).get(inner)
    if logical is None:
        return []
    if inner in _PER_HEAD and len(shape) == 2 and heads and shape[0] % heads == 0:
        shape = (heads, shape[0] // heads, shape[1])  # some converters merge the axis of heads into the rows
    return [_stored_weight(prefix + logical, located, shape, slice(None))]


def _stored_weight(name: str, located: LocatedTensor, shape: tuple[int, ...], rows: slice) -> StoredWeight:
    original_name, kind = located.info.name, located.info.type.name
    if len(shape) < 2 and kind not in _PLAIN_DTYPES:
        raise CheckpointError(f"{printable(original_name)} is a vector of type {kind}: vectors are never quantized")
    spec = REPACKED_TYPES[kind][0] if kind in REPACKED_TYPES else None
    dtype = _PLAIN_DTYPES.get(kind, _FLOAT32)
    return StoredWeight(name, shape, dtype, spec, (original_name,), _TensorLoader(located, shape, rows))


def _check_types(tensors: Mapping[str, LocatedTensor]) -> None:
    first_of_type: dict[str, tuple[GgmlType, str]] = {}
    for name, located in tensors.items():
        first_of_type.setdefault(located.info.type.name, (located.info.type, printable(name)))
    supported = {*_PLAIN_DTYPES, *REPACKED_TYPES, *EXPANDED_TYPES}
    for kind, (_, name) in first_of_type.items():
        if kind not in supported:
            raise CheckpointError(
                f"{name} is of type {kind}, which cannot be read; known are {', '.join(sorted(supported))}"
            )
    for kind, (ggml_type, name) in first_of_type.items():
        if kind in EXPANDED_TYPES:
            # A missing or old gguf package is reported now and not after an hour of reading.
            expand_blocks(np.zeros((1, ggml_type.type_size), np.uint8), ggml_type, name)
