"""The tensors of a GGUF file as weights under their logical names."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.formats.base import Array, Stored
from glm_jax.checkpoint.formats.gguf.blocks import EXPANDED, REPACKED, expand, repack
from glm_jax.checkpoint.formats.gguf.ggml_types import TensorType
from glm_jax.checkpoint.formats.gguf.header import Entry
from glm_jax.checkpoint.formats.gguf.split_files import Placed
from glm_jax.checkpoint.safetensors.header import printable
from glm_jax.checkpoint.safetensors.reader import listing
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor

_REST = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
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
    f"ffn_{part}{ours}.weight": f"mlp.{theirs}{part}_proj.weight"
    for part in ("gate", "up", "down")
    for ours, theirs in (("", ""), ("_exps", "switch_mlp."), ("_shexp", "shared_experts."))
}
_BOTH = "ffn_gate_up_exps.weight"  # gate in the first half of the rows, up in the second
_WHOLE = "attn_kv_b.weight"
_PER_HEAD = ("attn_k_b.weight", "attn_v_b.weight")
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)", re.DOTALL)

_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    """Loads a tensor, or one entry of its leading axis.

    Attributes:
        placed: where it is.
        shape: as the weight has it, which may be another than the file's.
        rows: of each matrix, those that are meant.
    """

    placed: Placed
    shape: tuple[int, ...]
    rows: slice

    def __call__(self, index: int | None = None) -> Array | QuantizedTensor:
        entry = self.placed.entry
        raw = self.placed.part.raw(entry)
        if len(self.shape) > 1:
            raw = raw.reshape(*self._stored_shape(), entry.row_bytes)[..., self.rows, :]
        dtype = _PLAIN.get(entry.type.name)
        if dtype is not None:
            raw = raw.view(dtype)
        if index is not None:
            if dtype is None and len(self.shape) < 3:
                raise IndexError("a single matrix has no stack axis to index")
            raw = raw[index]
        return _values(raw, entry) if dtype is None else raw

    def _stored_shape(self) -> tuple[int, ...]:
        """``[*stack, O]`` of the whole tensor, with all rows."""
        stack = self.shape[:-2]
        return (*stack, math.prod(self.placed.entry.shape[:-1]) // math.prod(stack))


def _values(raw: Array, entry: Entry) -> Array | QuantizedTensor:
    read = repack if entry.type.name in REPACKED else expand
    return read(raw, entry.type, printable(entry.name))


def named_weights(tensors: Mapping[str, Placed], config: Mapping[str, Any]) -> tuple[dict[str, Stored], list[str]]:
    """Weights by logical name, and what is worth telling of them.

    Names are those of Hugging Face checkpoints where these have the tensor. Stacked experts are
    ``mlp.switch_mlp.*_proj.weight`` ``[E, O, I]``; the halves of kv_b are ``self_attn.embed_q.weight`` ``[N, R, Hn]``
    and ``self_attn.unembed_out.weight`` ``[N, Hv, R]``.

    Args:
        tensors: by their names in the file.
        config: that :func:`~glm_jax.checkpoint.formats.gguf.hf_config.model_config` made of the same file.

    Raises:
        CheckpointError: for tensors that this model does not have, and for types that cannot be read.
    """
    both = {name for name in tensors if name.endswith(_WHOLE) and _has_halves(name, tensors)}
    weights: dict[str, Stored] = {}
    unknown: list[str] = []
    for name, placed in tensors.items():
        if name in both:
            continue
        found = _stored(name, placed, config["num_attention_heads"])
        if not found:
            unknown.append(printable(name))
        weights |= {stored.name: stored for stored in found}
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors that GLM-4.7-Flash does not have: {listing(unknown)}")
    _check_types(tensors)
    return weights, ["attn_kv_b is left out where the file has its halves as well"] if both else []


def _has_halves(name: str, tensors: Mapping[str, Placed]) -> bool:
    return all(name.removesuffix(_WHOLE) + half in tensors for half in _PER_HEAD)


def _stored(name: str, placed: Placed, heads: int) -> list[Stored]:
    block = _BLOCK.fullmatch(name)
    prefix, inner = (f"model.layers.{block[1]}.", block[2]) if block else ("", name)
    shape = placed.entry.shape
    if block and inner == _BOTH and len(shape) == 3 and shape[1] % 2 == 0:
        half = (shape[0], shape[1] // 2, shape[2])
        parts = (("gate", slice(None, half[1])), ("up", slice(half[1], None)))
        return [_weight(f"{prefix}mlp.switch_mlp.{part}_proj.weight", placed, half, rows) for part, rows in parts]
    logical = (_LAYER if block else _REST).get(inner)
    if logical is None:
        return []
    if inner in _PER_HEAD and len(shape) == 2 and heads and shape[0] % heads == 0:
        shape = (heads, shape[0] // heads, shape[1])  # some converters write the heads below each other
    return [_weight(prefix + logical, placed, shape, slice(None))]


def _weight(name: str, placed: Placed, shape: tuple[int, ...], rows: slice) -> Stored:
    kind = placed.entry.type.name
    if len(shape) < 2 and kind not in _PLAIN:
        raise CheckpointError(f"{printable(placed.entry.name)} is a vector of type {kind}: vectors are never quantised")
    spec = REPACKED[kind][0] if kind in REPACKED else None
    return Stored(name, shape, _PLAIN.get(kind, _FLOAT32), spec, (placed.entry.name,), _Tensor(placed, shape, rows))


def _check_types(tensors: Mapping[str, Placed]) -> None:
    found: dict[str, tuple[TensorType, str]] = {}
    for name, placed in tensors.items():
        found.setdefault(placed.entry.type.name, (placed.entry.type, printable(name)))
    readable = {*_PLAIN, *REPACKED, *EXPANDED}
    for kind, (_, name) in found.items():
        if kind not in readable:
            raise CheckpointError(
                f"{name} is of type {kind}, which cannot be read; known are {', '.join(sorted(readable))}"
            )
    for kind, (tensor_type, name) in found.items():
        if kind in EXPANDED:
            # Better now than after an hour of reading.
            expand(np.zeros((1, tensor_type.nbytes), np.uint8), tensor_type, name)
