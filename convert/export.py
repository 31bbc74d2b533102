"""Any source as the tensors of a Hugging Face checkpoint: the rule table read backwards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.layout import MTP, REST, Leaf
from convert.manifest import DTYPES
from convert.rules import Matcher, Tensor
from convert.source import Array, WeightSource, kept_dtype
from convert.writer import Output

_BLOCK_BYTES = 32 << 20


def outputs(source: WeightSource, dtype: np.dtype[Any] | None = None) -> list[Output]:
    """Every tensor of the checkpoint under its real name, copies included where the original had them.

    Args:
        source: the weights.
        dtype: to convert to; ``None`` gives each tensor the dtype that the original had.
    """
    original = source.info.original
    tensors = [*Matcher(source.cfg).expected()]
    if source.cfg.mtp_own_embeddings:
        absent = {f"{MTP}/{key}" for key in ("embed", "head")} - {f"{MTP}/{key}" for key in original.mtp_copies}
        tensors = [t for t in tensors if f"{t.leaves[0].part}/{t.leaves[0].name}" not in absent]
    plain = [_output(source, tensor, dtype) for tensor in tensors]
    return [*plain, *_copies(source, dtype)]


def _output(source: WeightSource, tensor: Tensor, dtype: np.dtype[Any] | None) -> Output:
    kept = _written_dtype(source, tensor.leaves[0], dtype)
    return Output(tensor.name, tensor.shape, kept, functools.partial(_blocks, source, tensor, kept))


def _written_dtype(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    narrow = source.info.original.dtypes.get(f"{leaf.part}/{leaf.name}")
    return DTYPES[narrow] if narrow and dtype is None else kept_dtype(source, leaf, dtype)


def _blocks(source: WeightSource, tensor: Tensor, dtype: np.dtype[Any]) -> Iterator[Array]:
    leaf, *others = tensor.leaves
    if others:
        yield tensor.rule.transform.join([_whole(source, leaf, dtype) for leaf in tensor.leaves])
        return
    start, stop = (0, None) if tensor.expert is None else (tensor.expert, tensor.expert + 1)
    for _, piece in source.pieces(leaf, start, stop):
        yield from _cast_rows(piece, dtype)


def _whole(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any]) -> Array:
    return np.concatenate([piece.astype(dtype, copy=False) for _, piece in source.pieces(leaf)])


def _cast_rows(piece: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    count = len(piece)
    rows = max(1, _BLOCK_BYTES * count // max(1, piece.nbytes))
    for at in range(0, count, rows):
        yield piece[at : at + rows].astype(dtype, copy=False)


def _copies(source: WeightSource, dtype: np.dtype[Any] | None) -> Iterator[Output]:
    """Tensors of the original that repeat another one."""
    cfg, original = source.cfg, source.info.original
    rest = {leaf.name: leaf for leaf in source.layout()[REST]}
    head = rest.get("head", rest["embed"])
    names = {}
    if cfg.num_nextn_predict_layers and not cfg.mtp_own_embeddings:
        prefix = f"model.layers.{cfg.num_hidden_layers}."
        known = {
            "embed": (f"{prefix}embed_tokens.weight", rest["embed"]),
            "head": (f"{prefix}shared_head.head.weight", head),
        }
        names.update(known[key] for key in original.mtp_copies)
    if cfg.tie_word_embeddings and original.head_copy:
        names["lm_head.weight"] = rest["embed"]
    for name, leaf in names.items():
        kept = kept_dtype(source, leaf, dtype)
        blocks = functools.partial(_leaf_blocks, source, leaf, kept)
        yield Output(name, leaf.shape, kept, blocks)


def _leaf_blocks(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any]) -> Iterator[Array]:
    for _, piece in source.pieces(leaf):
        yield from _cast_rows(piece, dtype)
