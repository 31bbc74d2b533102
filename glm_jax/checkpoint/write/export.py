"""Exports a source as the tensors of a Hugging Face checkpoint: applies the mapping rules in reverse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import MTP, Leaf
from glm_jax.checkpoint.formats.quantization_config import QUANTIZATION_CONFIG_KEYS
from glm_jax.checkpoint.mapping.matching import CheckpointTensor, TensorMatcher
from glm_jax.checkpoint.safetensors.writer import TensorOutput
from glm_jax.checkpoint.sources.base import Array, WeightSource
from glm_jax.checkpoint.sources.build import to_plain_array
from glm_jax.checkpoint.write.export_plan import ExportPlan, QuantizedMatrixLoader, is_linear_weight, plan_export
from glm_jax.checkpoint.write.pack_quantized import WEIGHT_SUFFIX, build_quantization_config, pack_module
from glm_jax.weights import QuantSpec

_BLOCK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedCheckpoint:
    """A Hugging Face checkpoint that is ready to be written.

    Attributes:
        outputs: All tensors by their names in the checkpoint, including the copies that the original had.
        config: Contents of ``config.json``; describes quantized weights as compressed-tensors does.
        notes: Sentences for the user.
    """

    outputs: Sequence[TensorOutput]
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def export_checkpoint(source: WeightSource, dtype: np.dtype[Any] | None = None) -> ExportedCheckpoint:
    """Exports a source; weights stay quantized where compressed-tensors can hold them.

    Args:
        source: The weights.
        dtype: Dtype of weights that are written plain; ``None`` gives each tensor its original dtype.
    """
    tensors = [*_exported_tensors(source)]
    exporter = _Exporter(source, plan_export(source, tensors, dtype), dtype)
    named_tensors = [(tensor.name, tensor) for tensor in tensors] + [*_copies(source)]
    outputs = [output for name, tensor in named_tensors for output in exporter.outputs(tensor, name)]
    hf_config = {key: value for key, value in source.hf_config.items() if key not in QUANTIZATION_CONFIG_KEYS}
    config = {"dtype": exporter.plan.dtype.name, **hf_config}
    if exporter.plan.quant_specs:
        config["quantization_config"] = _quantization_config(exporter.plan, named_tensors)
    return ExportedCheckpoint(outputs, {**config, **source.cfg.to_hf()}, exporter.plan.notes)


def _quantization_config(plan: ExportPlan, named_tensors: Sequence[tuple[str, CheckpointTensor]]) -> dict[str, Any]:
    packed: dict[str, QuantSpec] = {}
    ignored = ["lm_head"]  # readers may create this module even for tied embeddings
    for name, tensor in named_tensors:
        module, spec = name.removesuffix(WEIGHT_SUFFIX), plan.quant_spec(tensor)
        if spec is not None:
            packed[module] = spec
        elif is_linear_weight(tensor, name):
            ignored.append(module)
    return build_quantization_config(packed, [module for module in dict.fromkeys(ignored) if module not in packed])


def _exported_tensors(source: WeightSource) -> Iterator[CheckpointTensor]:
    """Yields the tensors of the model, without those that the original did not have."""
    absent: set[str] = set()
    if source.cfg.mtp_own_embeddings:
        absent = {f"{MTP}/{key}" for key in ("embed", "head")}
        absent -= {f"{MTP}/{key}" for key in source.info.original.mtp_copies}
    for tensor in TensorMatcher(source.cfg).expected_tensors():
        if f"{tensor.leaves[0].checkpoint_name}/{tensor.leaves[0].name}" not in absent:
            yield tensor


def _copies(source: WeightSource) -> Iterator[tuple[str, CheckpointTensor]]:
    """Yields (name, tensor) for each tensor that the original stored as a copy of another one."""
    cfg, original = source.cfg, source.info.original
    matcher = TensorMatcher(cfg)
    embed, head = (matcher.match(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    head = head or embed
    copies = {}
    if cfg.num_nextn_predict_layers and not cfg.mtp_own_embeddings:
        prefix = f"model.layers.{cfg.num_hidden_layers}."
        known = {"embed": (f"{prefix}embed_tokens.weight", embed), "head": (f"{prefix}shared_head.head.weight", head)}
        copies.update(known[key] for key in original.mtp_copies)
    if cfg.tie_word_embeddings and original.head_copy:
        copies["lm_head.weight"] = embed
    yield from ((name, tensor) for name, tensor in copies.items() if tensor)


@dataclasses.dataclass(frozen=True, slots=True)
class _Exporter:
    """Produces the output tensors of a source according to an export plan."""

    source: WeightSource
    plan: ExportPlan
    dtype: np.dtype[Any] | None
    matrices: QuantizedMatrixLoader = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", QuantizedMatrixLoader(self.source))

    def outputs(self, tensor: CheckpointTensor, name: str) -> list[TensorOutput]:
        """Returns the output tensors of a checkpoint tensor under ``name``, its own or that of a copy."""
        spec = self.plan.quant_spec(tensor)
        if spec is None:
            dtype = self._plain_dtype(tensor.leaves[0])
            iter_blocks = functools.partial(_iter_blocks, self.source, tensor, dtype)
            return [TensorOutput(name, tensor.shape, dtype, iter_blocks)]
        outputs, inputs = tensor.shape
        load = self.matrices.loader(tensor, tensor.name)
        return pack_module(name.removesuffix(WEIGHT_SUFFIX), spec, (outputs, inputs), load)

    def _plain_dtype(self, leaf: Leaf) -> np.dtype[Any]:
        original = self.source.info.original.dtypes.get(f"{leaf.checkpoint_name}/{leaf.name}")
        if original and self.dtype is None:
            return FLOAT_DTYPES[original]
        if self.source.quant_spec(leaf) is not None:
            return self.plan.dtype
        return self.source.output_dtype(leaf, self.dtype)


def _iter_blocks(source: WeightSource, tensor: CheckpointTensor, dtype: np.dtype[Any]) -> Iterator[Array]:
    leaf, *others = tensor.leaves
    if others:
        yield tensor.rule.transform.join([_load_array(source, leaf, dtype) for leaf in tensor.leaves])
        return
    start, stop = (0, None) if tensor.expert is None else (tensor.expert, tensor.expert + 1)
    for _, chunk in source.iter_chunks(leaf, start, stop):
        yield from _cast_rows(to_plain_array(chunk), dtype)


def _load_array(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any]) -> Array:
    return np.concatenate([to_plain_array(chunk).astype(dtype, copy=False) for _, chunk in source.iter_chunks(leaf)])


def _cast_rows(array: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    rows = max(1, _BLOCK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows].astype(dtype, copy=False)
