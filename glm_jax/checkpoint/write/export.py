"""Any source as the tensors of a Hugging Face checkpoint: the rule table read backwards."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.folder.layout import MTP, Leaf
from glm_jax.checkpoint.folder.manifest import DTYPES
from glm_jax.checkpoint.formats.quantization_config import SECTIONS
from glm_jax.checkpoint.mapping.rules import Matcher, Tensor
from glm_jax.checkpoint.safetensors.writer import Output
from glm_jax.checkpoint.sources.base import Array, WeightSource, kept_dtype, plain
from glm_jax.checkpoint.write.export_plan import ExportPlan, Matrices, linear, plan_export
from glm_jax.checkpoint.write.pack_quantized import WEIGHT, module_outputs, section
from glm_jax.weights import QuantSpec

_BLOCK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint to be written.

    Attributes:
        outputs: every tensor under its real name, copies included where the original had them.
        config: its ``config.json``, which describes quantised weights as compressed-tensors does.
        notes: sentences worth telling the user.
    """

    outputs: Sequence[Output]
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def export(source: WeightSource, dtype: np.dtype[Any] | None = None) -> Export:
    """The checkpoint of a source. Weights that are quantised stay so where compressed-tensors can hold them.

    Args:
        source: the weights.
        dtype: to convert what is not quantised to; ``None`` gives each tensor the dtype that the original had.
    """
    tensors = [*_tensors(source)]
    exporter = _Exporter(source, plan_export(source, tensors, dtype), dtype)
    copies = [*_copies(source)]
    found = [output for tensor in tensors for output in exporter.outputs(tensor, tensor.name)]
    found += [output for name, tensor in copies for output in exporter.outputs(tensor, name)]
    names = [(tensor.name, tensor) for tensor in tensors] + copies
    said = source.hf_config
    config = {"dtype": exporter.plan.dtype.name, **{key: said[key] for key in said if key not in SECTIONS}}
    if exporter.plan.packed:
        config["quantization_config"] = _section(exporter.plan, names)
    return Export(found, {**config, **source.cfg.to_hf()}, exporter.plan.notes)


def _section(plan: ExportPlan, names: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    packed: dict[str, QuantSpec] = {}
    left = {"lm_head": None}  # programs may have the module even where the embedding serves as one
    for name, tensor in names:
        module, spec = name.removesuffix(WEIGHT), plan.spec(tensor)
        if spec is not None:
            packed[module] = spec
        elif linear(tensor, name):
            left[module] = None
    return section(packed, [module for module in left if module not in packed])


def _tensors(source: WeightSource) -> Iterator[Tensor]:
    absent: set[str] = set()
    if source.cfg.mtp_own_embeddings:
        absent = {f"{MTP}/{key}" for key in ("embed", "head")}
        absent -= {f"{MTP}/{key}" for key in source.info.original.mtp_copies}
    for tensor in Matcher(source.cfg).expected():
        if f"{tensor.leaves[0].part}/{tensor.leaves[0].name}" not in absent:
            yield tensor


def _copies(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the original that repeat another one."""
    cfg, original = source.cfg, source.info.original
    matcher = Matcher(cfg)
    embed, head = (matcher.match(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    head = head or embed
    names = {}
    if cfg.num_nextn_predict_layers and not cfg.mtp_own_embeddings:
        prefix = f"model.layers.{cfg.num_hidden_layers}."
        known = {"embed": (f"{prefix}embed_tokens.weight", embed), "head": (f"{prefix}shared_head.head.weight", head)}
        names.update(known[key] for key in original.mtp_copies)
    if cfg.tie_word_embeddings and original.head_copy:
        names["lm_head.weight"] = embed
    yield from ((name, tensor) for name, tensor in names.items() if tensor)


@dataclasses.dataclass(frozen=True, slots=True)
class _Exporter:
    """Tensors of a source as they are written."""

    source: WeightSource
    plan: ExportPlan
    dtype: np.dtype[Any] | None
    matrices: Matrices = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", Matrices(self.source))

    def outputs(self, tensor: Tensor, name: str) -> list[Output]:
        """What becomes of a tensor, under a name that may be that of a copy."""
        spec = self.plan.spec(tensor)
        if spec is None:
            kept = self._kept(tensor.leaves[0])
            return [Output(name, tensor.shape, kept, functools.partial(_blocks, self.source, tensor, kept))]
        outputs, inputs = tensor.shape
        load = self.matrices.of(tensor, tensor.name)
        return module_outputs(name.removesuffix(WEIGHT), spec, (outputs, inputs), load)

    def _kept(self, leaf: Leaf) -> np.dtype[Any]:
        narrow = self.source.info.original.dtypes.get(f"{leaf.part}/{leaf.name}")
        if narrow and self.dtype is None:
            return DTYPES[narrow]
        if self.source.storage(leaf) is not None:
            return self.plan.dtype
        return kept_dtype(self.source, leaf, self.dtype)


def _blocks(source: WeightSource, tensor: Tensor, dtype: np.dtype[Any]) -> Iterator[Array]:
    leaf, *others = tensor.leaves
    if others:
        yield tensor.rule.transform.join([_whole(source, leaf, dtype) for leaf in tensor.leaves])
        return
    start, stop = (0, None) if tensor.expert is None else (tensor.expert, tensor.expert + 1)
    for _, piece in source.pieces(leaf, start, stop):
        yield from _cast_rows(plain(piece), dtype)


def _whole(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any]) -> Array:
    return np.concatenate([plain(piece).astype(dtype, copy=False) for _, piece in source.pieces(leaf)])


def _cast_rows(piece: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    count = len(piece)
    rows = max(1, _BLOCK_BYTES * count // max(1, piece.nbytes))
    for at in range(0, count, rows):
        yield piece[at : at + rows].astype(dtype, copy=False)
