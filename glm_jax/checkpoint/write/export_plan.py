"""Which weights of a quantized source stay quantized in a Hugging Face folder, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import MTP, Leaf
from glm_jax.checkpoint.formats.reshape import undo_permutation
from glm_jax.checkpoint.mapping.rules import CheckpointTensor
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.write.pack_quantized import has_zero_point_overflow, pack_unsupported_reason
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.params import is_matrix

TensorKind = tuple[str, str]  # part, and name of the rule: all experts of a layer are one kind

# No modules of Linear's kind in the programs that read such folders.
_NOT_LINEAR = {
    "model.embed_tokens.weight": "the embedding",
    "embed_tokens.weight": "the embedding",
    "eh_proj.weight": "the projection into the prediction layer",
}
# Serving engines make one module of these, and one storage must fit all.
_FUSED_MODULES = (
    ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    *[
        tuple(f"{prefix}.{part}_proj.weight" for part in parts)
        for prefix, parts in (
            ("mlp", ("gate", "up")),
            ("mlp.shared_experts", ("gate", "up")),
            ("mlp.experts.{expert}", ("gate", "up", "down")),
        )
    ],
)
_ROUTED_PREFIX = "mlp.experts.{expert}."


@dataclasses.dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export does with the quantized weights of its source.

    Attributes:
        quant_specs: how each kind of tensor that stays quantized is stored.
        dtype: of the values of those that do not.
        notes: sentences about these, and on who reads the others.
    """

    quant_specs: Mapping[TensorKind, QuantSpec]
    dtype: np.dtype[Any]
    notes: tuple[str, ...]

    def quant_spec(self, tensor: CheckpointTensor) -> QuantSpec | None:
        """How a tensor is stored; None for a plain one."""
        return self.quant_specs.get(tensor_kind(tensor))


def tensor_kind(tensor: CheckpointTensor) -> TensorKind:
    """The kind of a tensor."""
    return tensor.leaves[0].checkpoint_name, tensor.rule.name


def plan_export(source: WeightSource, tensors: Sequence[CheckpointTensor], dtype: np.dtype[Any] | None) -> ExportPlan:
    """Decides from headers, and from the zero points where there are any.

    Args:
        source: the weights.
        tensors: of the checkpoint that is to be written.
        dtype: of what is not quantized, if it is to be converted.
    """
    kinds = {tensor_kind(tensor): tensor for tensor in tensors}
    quantized = {kind: tensor for kind, tensor in kinds.items() if any(map(source.quant_spec, tensor.leaves))}
    reasons = {kind: reason for kind, tensor in quantized.items() if (reason := _dequantize_reason(source, tensor))}
    packed = {kind: _packed_spec(source, tensor) for kind, tensor in quantized.items() if kind not in reasons}
    for kind in [*packed]:
        members = [(kind[0], name) for names in _FUSED_MODULES if kind[1] in names for name in names]
        if len({_scheme(packed.get(member)) for member in members if member in kinds}) > 1:
            reasons[kind] = "stored otherwise than what it is one module with elsewhere"
    packed = {kind: spec for kind, spec in packed.items() if kind not in reasons}
    experts = [kind for kind in kinds if kind[1].startswith(_ROUTED_PREFIX) and kind[0] != MTP]
    if experts and not any(kind in packed for kind in experts):
        reasons |= dict.fromkeys(packed, "beside plain experts, where transformers reads no packed weights")
        packed = {}
    chosen = dtype or _model_dtype(source, bool(quantized))
    left = [(quantized[kind], reason) for kind, reason in reasons.items()]
    return ExportPlan(packed, chosen, (*_dequantized_notes(left, chosen), *_compatibility_notes(packed, experts)))


def _dequantize_reason(source: WeightSource, tensor: CheckpointTensor) -> str | None:
    """Why a tensor cannot stay quantized; None if it can."""
    specs = [source.quant_spec(leaf) for leaf in tensor.leaves]
    first = specs[0]
    if reason := _NOT_LINEAR.get(tensor.rule.name):
        return reason
    if first is None or any(spec != first for spec in specs):
        return "halves that are stored in different ways"
    if reason := pack_unsupported_reason(first, tensor.leaves[0].shape):
        return reason
    # Those that are made here stay within their bits.
    scan = first.zero == "point" and not isinstance(source, RequantizedSource)
    if scan and any(map(has_zero_point_overflow, _pieces(source, tensor.leaves))):
        return f"a zero point of {1 << first.bits}"
    return None


def _packed_spec(source: WeightSource, tensor: CheckpointTensor) -> QuantSpec:
    spec = source.quant_spec(tensor.leaves[0])
    assert spec is not None  # a kind without a reason is quantized
    return dataclasses.replace(spec, permuted=False)


def _scheme(spec: QuantSpec | None) -> Any:
    """What the description of a folder says of a module: all but the dtype of its scales."""
    return spec and (spec.bits, spec.zero, spec.block)


def _pieces(source: WeightSource, leaves: Sequence[Leaf]) -> Iterator[QuantizedTensor]:
    for leaf in leaves:
        for _, piece in source.iter_chunks(leaf):
            assert isinstance(piece, QuantizedTensor)  # the source says that it is quantized
            yield piece


def _model_dtype(source: WeightSource, quantized: bool) -> np.dtype[Any]:
    """That of the model, which scales and dequantized values need not have."""
    said = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype")
    if said in FLOAT_DTYPES:
        return FLOAT_DTYPES[said]
    # GGUF names no dtype, and its quantized values are float32 for lack of a better one.
    wide = quantized and source.info.kind == "gguf" and source.info.dtype == "float32"
    return FLOAT_DTYPES["bfloat16" if wide else source.info.dtype]


def _dequantized_notes(left: Sequence[tuple[CheckpointTensor, str]], dtype: np.dtype[Any]) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for tensor, reason in left:
        sizes[reason] = sizes.get(reason, 0) + sum(leaf.size for leaf in tensor.leaves)
    if sizes:
        listed = "; ".join(f"{reason} ({size / 1e9:.2g} G)" for reason, size in sizes.items())
        how = "in float32" if dtype == np.float32 else f"rounded to {dtype.name}"
        yield (
            f"{sum(sizes.values()) / 1e9:.2g} G of the quantized weights are written {how}, because "
            f"compressed-tensors' Linear modules do not hold them as they are: {listed}"
        )


def _compatibility_notes(packed: Mapping[TensorKind, QuantSpec], experts: Sequence[TensorKind]) -> Iterator[str]:
    ways = {_scheme(packed.get(kind)) for kind in experts} if packed else set()
    if len(ways) > 1:
        yield f"the layers' experts are stored in {len(ways)} ways: serving engines read that, transformers does not"
    elif any(packed[kind].zero == "point" for kind in experts if kind in packed):
        yield "the experts have zero points: serving engines read these, transformers does not"
    elif any(spec.zero == "point" for spec in packed.values()):
        yield (
            "some weights have zero points: serving engines read these, transformers only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )


class QuantizedMatrixLoader:
    """The quantized matrices of a source, in the shape that a checkpoint has them; the last one is kept."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._latest: tuple[str, QuantizedTensor] | None = None

    def loader(self, tensor: CheckpointTensor, name: str) -> Callable[[], QuantizedTensor]:
        """Loads the matrix of a tensor when called; ``name`` tells it from every other."""
        return functools.partial(self._get, tensor, name)

    def _get(self, tensor: CheckpointTensor, name: str) -> QuantizedTensor:
        # A module's tensors are written one after the other, and reading (or quantizing) a matrix takes time.
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            self._latest = (name, self._load(tensor))
        return self._latest[1]

    def _load(self, tensor: CheckpointTensor) -> QuantizedTensor:
        leaves = [self._whole(leaf, tensor.expert) for leaf in tensor.leaves]
        return leaves[0] if len(leaves) == 1 else _merge_heads(leaves)

    def _whole(self, leaf: Leaf, expert: int | None) -> QuantizedTensor:
        start, stop = (0, None) if expert is None else (expert, expert + 1)
        pieces = []
        for _, piece in self._source.iter_chunks(leaf, start, stop):
            assert isinstance(piece, QuantizedTensor)  # the source says that it is quantized
            piece = piece.map_components(lambda _, array: np.asarray(array))
            pieces.append(undo_permutation(piece) if piece.spec.permuted else piece)
        whole = pieces[0] if len(pieces) == 1 else _concatenate(pieces)
        return whole if expert is None else whole[0]


def _concatenate(pieces: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Rows of the first axis, each with its own scales."""
    return pieces[0].map_components(lambda name, _: np.concatenate([getattr(piece, name) for piece in pieces]))


def _merge_heads(halves: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices ``[N, H, I]`` of the same heads, as one ``[N * H, I]`` in which the heads take turns."""

    def join(name: str, _: Any) -> Any:
        both = np.concatenate([getattr(half, name) for half in halves], axis=1)
        return both.reshape(-1, both.shape[-1])

    return halves[0].map_components(join)


def is_linear_weight(tensor: CheckpointTensor, name: str) -> bool:
    """Whether a tensor, under the name that it is written by, is the weight of a Linear module."""
    return is_matrix(tensor.leaves[0].spec) and not name.endswith("embed_tokens.weight")
