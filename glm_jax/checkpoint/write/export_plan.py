"""Decides which weights of a quantized source stay quantized in a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import MTP, Leaf
from glm_jax.checkpoint.formats.reshape import undo_permutation
from glm_jax.checkpoint.mapping.matching import CheckpointTensor
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.write.pack_quantized import has_zero_point_overflow, pack_unsupported_reason
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.params import is_matrix

Array = np.ndarray[Any, np.dtype[Any]]
TensorKind = tuple[str, str]  # (layer checkpoint, mapping rule): all experts of a layer are one kind

# Modules that are not Linear in the programs that read these folders.
_NOT_LINEAR = {
    "model.embed_tokens.weight": "the embedding",
    "embed_tokens.weight": "the embedding",
    "eh_proj.weight": "the projection into the prediction layer",
}
# Serving engines fuse the modules of each tuple, so all must have one storage.
_FUSED_MODULES = (
    ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    *[
        tuple(f"{prefix}.{name}_proj.weight" for name in names)
        for prefix, names in (
            ("mlp", ("gate", "up")),
            ("mlp.shared_experts", ("gate", "up")),
            ("mlp.experts.{expert}", ("gate", "up", "down")),
        )
    ],
)
_ROUTED_PREFIX = "mlp.experts.{expert}."


@dataclasses.dataclass(frozen=True, slots=True)
class ExportPlan:
    """The storage of every tensor in an export.

    Attributes:
        quant_specs: Storage of each kind of tensor that stays quantized.
        dtype: Dtype of quantized weights that are written plain.
        notes: Sentences about weights written plain, and about programs that cannot read the quantized ones.
    """

    quant_specs: Mapping[TensorKind, QuantSpec]
    dtype: np.dtype[Any]
    notes: tuple[str, ...]

    def quant_spec(self, tensor: CheckpointTensor) -> QuantSpec | None:
        """Returns the storage of a tensor; ``None`` for a plain one."""
        return self.quant_specs.get(tensor_kind(tensor))


def tensor_kind(tensor: CheckpointTensor) -> TensorKind:
    """Returns the kind of a tensor."""
    return tensor.leaves[0].checkpoint_name, tensor.rule.name


def plan_export(source: WeightSource, tensors: Sequence[CheckpointTensor], dtype: np.dtype[Any] | None) -> ExportPlan:
    """Plans an export; reads headers, and the zero points of weights that have them.

    Args:
        source: The weights.
        tensors: Tensors of the checkpoint to write.
        dtype: Dtype of weights that are written plain; ``None`` for the model's own.
    """
    kinds = {tensor_kind(tensor): tensor for tensor in tensors}
    quantized = {kind: tensor for kind, tensor in kinds.items() if any(map(source.quant_spec, tensor.leaves))}
    reasons = {kind: reason for kind, tensor in quantized.items() if (reason := _dequantize_reason(source, tensor))}
    packed = {kind: _packed_spec(source, tensor) for kind, tensor in quantized.items() if kind not in reasons}
    for kind in [*packed]:
        members = [(kind[0], name) for names in _FUSED_MODULES if kind[1] in names for name in names]
        if len({_scheme(packed.get(member)) for member in members if member in kinds}) > 1:
            reasons[kind] = "stored differently from weights that serving engines fuse with them"
    packed = {kind: spec for kind, spec in packed.items() if kind not in reasons}
    experts = [kind for kind in kinds if kind[1].startswith(_ROUTED_PREFIX) and kind[0] != MTP]
    if experts and not any(kind in packed for kind in experts):
        reasons |= dict.fromkeys(packed, "beside plain experts, where transformers reads no packed weights")
        packed = {}
    plain_dtype = dtype or _model_dtype(source, bool(quantized))
    dequantized = [(quantized[kind], reason) for kind, reason in reasons.items()]
    notes = (*_dequantized_notes(dequantized, plain_dtype), *_compatibility_notes(packed, experts))
    return ExportPlan(packed, plain_dtype, notes)


def _dequantize_reason(source: WeightSource, tensor: CheckpointTensor) -> str | None:
    """Returns why a tensor cannot stay quantized; ``None`` if it can."""
    specs = [source.quant_spec(leaf) for leaf in tensor.leaves]
    first = specs[0]
    if reason := _NOT_LINEAR.get(tensor.rule.name):
        return reason
    if first is None or any(spec != first for spec in specs):
        return "two halves with different storage"
    if reason := pack_unsupported_reason(first, tensor.leaves[0].shape):
        return reason
    # Weights that this package quantized have zero points in range.
    scan = first.zero == "point" and not isinstance(source, RequantizedSource)
    if scan and any(map(has_zero_point_overflow, _iter_quantized_chunks(source, tensor.leaves))):
        return f"a zero point of {1 << first.bits}"
    return None


def _packed_spec(source: WeightSource, tensor: CheckpointTensor) -> QuantSpec:
    spec = source.quant_spec(tensor.leaves[0])
    assert spec is not None  # a kind without a reason is quantized
    return dataclasses.replace(spec, permuted=False)


def _scheme(spec: QuantSpec | None) -> tuple[int, str, tuple[int, int]] | None:
    """Returns the part of a storage that ``quantization_config`` describes: all but the dtype of the scales."""
    return spec and (spec.bits, spec.zero, spec.block)


def _iter_quantized_chunks(source: WeightSource, leaves: Sequence[Leaf]) -> Iterator[QuantizedTensor]:
    for leaf in leaves:
        for _, chunk in source.iter_chunks(leaf):
            assert isinstance(chunk, QuantizedTensor)  # its quant_spec says so
            yield chunk


def _model_dtype(source: WeightSource, quantized: bool) -> np.dtype[Any]:
    """Returns the model's dtype, which may differ from that of scales and dequantized values."""
    stated = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype")
    if stated in FLOAT_DTYPES:
        return FLOAT_DTYPES[stated]
    # GGUF files state no dtype, and their quantized values default to float32.
    wide = quantized and source.info.kind == "gguf" and source.info.dtype == "float32"
    return FLOAT_DTYPES["bfloat16" if wide else source.info.dtype]


def _dequantized_notes(dequantized: Sequence[tuple[CheckpointTensor, str]], dtype: np.dtype[Any]) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for tensor, reason in dequantized:
        sizes[reason] = sizes.get(reason, 0) + sum(leaf.size for leaf in tensor.leaves)
    if sizes:
        listed = "; ".join(f"{reason} ({size / 1e9:.2g} G)" for reason, size in sizes.items())
        how = "in float32" if dtype == np.float32 else f"rounded to {dtype.name}"
        yield (
            f"{sum(sizes.values()) / 1e9:.2g} G of the quantized weights are written {how}, because "
            f"compressed-tensors' Linear modules do not hold them as they are: {listed}"
        )


def _compatibility_notes(packed: Mapping[TensorKind, QuantSpec], experts: Sequence[TensorKind]) -> Iterator[str]:
    schemes = {_scheme(packed.get(kind)) for kind in experts} if packed else set()
    if len(schemes) > 1:
        yield f"the layers' experts are stored in {len(schemes)} ways: serving engines read that, transformers does not"
    elif any(packed[kind].zero == "point" for kind in experts if kind in packed):
        yield "the experts have zero points: serving engines read these, transformers does not"
    elif any(spec.zero == "point" for spec in packed.values()):
        yield (
            "some weights have zero points: serving engines read these, transformers only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )


class QuantizedMatrixLoader:
    """Loads the quantized matrices of a source in their shapes in a checkpoint; caches the latest one."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._latest: tuple[str, QuantizedTensor] | None = None

    def loader(self, tensor: CheckpointTensor, name: str) -> Callable[[], QuantizedTensor]:
        """Returns a function that loads the matrix of a tensor; ``name`` is the cache key."""
        return functools.partial(self._load_cached, tensor, name)

    def _load_cached(self, tensor: CheckpointTensor, name: str) -> QuantizedTensor:
        # The tensors of one module are written in a row, and reading or quantizing its matrix takes time.
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            self._latest = (name, self._load(tensor))
        return self._latest[1]

    def _load(self, tensor: CheckpointTensor) -> QuantizedTensor:
        matrices = [self._load_leaf(leaf, tensor.expert) for leaf in tensor.leaves]
        return matrices[0] if len(matrices) == 1 else _merge_heads(matrices)

    def _load_leaf(self, leaf: Leaf, expert: int | None) -> QuantizedTensor:
        start, stop = (0, None) if expert is None else (expert, expert + 1)
        chunks = []
        for _, chunk in self._source.iter_chunks(leaf, start, stop):
            assert isinstance(chunk, QuantizedTensor)  # its quant_spec says so
            chunk = chunk.map_components(lambda _, array: np.asarray(array))
            chunks.append(undo_permutation(chunk) if chunk.spec.permuted else chunk)
        whole = chunks[0] if len(chunks) == 1 else _concatenate(chunks)
        return whole if expert is None else whole[0]


def _concatenate(chunks: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Concatenates rows of the first axis, each of which has its own scales."""
    return chunks[0].map_components(lambda name, _: np.concatenate([getattr(chunk, name) for chunk in chunks]))


def _merge_heads(halves: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Merges matrices ``[N, H, I]`` into one ``[N * ΣH, I]`` that holds, head by head, the rows of each in turn."""

    def join(name: str, _: Any) -> Array:
        heads = np.concatenate([getattr(half, name) for half in halves], axis=1)
        return heads.reshape(-1, heads.shape[-1])

    return halves[0].map_components(join)


def is_linear_weight(tensor: CheckpointTensor, name: str) -> bool:
    """Returns whether a tensor is the weight of a Linear module under the name that it is written with."""
    return is_matrix(tensor.leaves[0].spec) and not name.endswith("embed_tokens.weight")
