"""Any source as the tensors of a Hugging Face checkpoint: the rule table read backwards."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import MTP, Leaf
from glm_jax.checkpoint.formats.quantization_config import QUANTIZATION_CONFIG_KEYS
from glm_jax.checkpoint.mapping.rules import CheckpointTensor, TensorMatcher
from glm_jax.checkpoint.safetensors.writer import TensorOutput
from glm_jax.checkpoint.sources.base import Array, WeightSource, output_dtype, to_plain_array
from glm_jax.checkpoint.write.export_plan import ExportPlan, QuantizedMatrixLoader, is_linear_weight, plan_export
from glm_jax.checkpoint.write.pack_quantized import WEIGHT_SUFFIX, build_quantization_config, pack_module
from glm_jax.weights import QuantSpec

_BLOCK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedCheckpoint:
    """A checkpoint to be written.

    Attributes:
        outputs: every tensor under its real name, copies included where the original had them.
        config: its ``config.json``, which describes quantized weights as compressed-tensors does.
        notes: sentences worth telling the user.
    """

    outputs: Sequence[TensorOutput]
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def export_checkpoint(source: WeightSource, dtype: np.dtype[Any] | None = None) -> ExportedCheckpoint:
    """The checkpoint of a source. Weights that are quantized stay so where compressed-tensors can hold them.

    Args:
        source: the weights.
        dtype: to convert what is not quantized to; ``None`` gives each tensor the dtype that the original had.
    """
    tensors = [*_exported_tensors(source)]
    exporter = _Exporter(source, plan_export(source, tensors, dtype), dtype)
    copies = [*_copies(source)]
    found = [output for tensor in tensors for output in exporter.outputs(tensor, tensor.name)]
    found += [output for name, tensor in copies for output in exporter.outputs(tensor, name)]
    names = [(tensor.name, tensor) for tensor in tensors] + copies
    said = source.hf_config
    config = {
        "dtype": exporter.plan.dtype.name,
        **{key: said[key] for key in said if key not in QUANTIZATION_CONFIG_KEYS},
    }
    if exporter.plan.quant_specs:
        config["quantization_config"] = _quantization_config(exporter.plan, names)
    return ExportedCheckpoint(found, {**config, **source.cfg.to_hf()}, exporter.plan.notes)


def _quantization_config(plan: ExportPlan, names: Sequence[tuple[str, CheckpointTensor]]) -> dict[str, Any]:
    packed: dict[str, QuantSpec] = {}
    left = {"lm_head": None}  # programs may have the module even where the embedding serves as one
    for name, tensor in names:
        module, spec = name.removesuffix(WEIGHT_SUFFIX), plan.quant_spec(tensor)
        if spec is not None:
            packed[module] = spec
        elif is_linear_weight(tensor, name):
            left[module] = None
    return build_quantization_config(packed, [module for module in left if module not in packed])


def _exported_tensors(source: WeightSource) -> Iterator[CheckpointTensor]:
    absent: set[str] = set()
    if source.cfg.mtp_own_embeddings:
        absent = {f"{MTP}/{key}" for key in ("embed", "head")}
        absent -= {f"{MTP}/{key}" for key in source.info.original.mtp_copies}
    for tensor in TensorMatcher(source.cfg).expected_tensors():
        if f"{tensor.leaves[0].checkpoint_name}/{tensor.leaves[0].name}" not in absent:
            yield tensor


def _copies(source: WeightSource) -> Iterator[tuple[str, CheckpointTensor]]:
    """Tensors of the original that repeat another one."""
    cfg, original = source.cfg, source.info.original
    matcher = TensorMatcher(cfg)
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
    matrices: QuantizedMatrixLoader = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", QuantizedMatrixLoader(self.source))

    def outputs(self, tensor: CheckpointTensor, name: str) -> list[TensorOutput]:
        """What becomes of a tensor, under a name that may be that of a copy."""
        spec = self.plan.quant_spec(tensor)
        if spec is None:
            kept = self._plain_dtype(tensor.leaves[0])
            return [TensorOutput(name, tensor.shape, kept, functools.partial(_iter_blocks, self.source, tensor, kept))]
        outputs, inputs = tensor.shape
        load = self.matrices.loader(tensor, tensor.name)
        return pack_module(name.removesuffix(WEIGHT_SUFFIX), spec, (outputs, inputs), load)

    def _plain_dtype(self, leaf: Leaf) -> np.dtype[Any]:
        narrow = self.source.info.original.dtypes.get(f"{leaf.checkpoint_name}/{leaf.name}")
        if narrow and self.dtype is None:
            return FLOAT_DTYPES[narrow]
        if self.source.quant_spec(leaf) is not None:
            return self.plan.dtype
        return output_dtype(self.source, leaf, self.dtype)


def _iter_blocks(source: WeightSource, tensor: CheckpointTensor, dtype: np.dtype[Any]) -> Iterator[Array]:
    leaf, *others = tensor.leaves
    if others:
        yield tensor.rule.transform.join([_load_array(source, leaf, dtype) for leaf in tensor.leaves])
        return
    start, stop = (0, None) if tensor.expert is None else (tensor.expert, tensor.expert + 1)
    for _, piece in source.iter_chunks(leaf, start, stop):
        yield from _cast_rows(to_plain_array(piece), dtype)


def _load_array(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any]) -> Array:
    return np.concatenate([to_plain_array(piece).astype(dtype, copy=False) for _, piece in source.iter_chunks(leaf)])


def _cast_rows(piece: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    count = len(piece)
    rows = max(1, _BLOCK_BYTES * count // max(1, piece.nbytes))
    for at in range(0, count, rows):
        yield piece[at : at + rows].astype(dtype, copy=False)
