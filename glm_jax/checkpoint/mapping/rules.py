"""Which checkpoint tensor fills which parameter: one rule per tensor, every parameter filled exactly once.

The table serves both directions. All disagreements between a checkpoint and its config are collected and reported
together, because a checkpoint with one wrong name usually has a hundred.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, Leaf, checkpoint_layout, layer_checkpoint_name
from glm_jax.checkpoint.formats.base import StoredWeight
from glm_jax.checkpoint.mapping.transforms import IDENTITY, MERGED_HEADS, TRANSPOSED, Transform
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.safetensors.header import SAFETENSORS_DTYPE_NAMES
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantSpec

_MAX_MISSING = 10_000
SAFETENSORS_FLOATS = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRule:
    """One kind of checkpoint tensor.

    Attributes:
        name: within its layer (or whole, outside the layers); ``{expert}`` stands for a number.
        param_names: parameters it fills, by name inside the part.
        transform: between the tensor and the parameters.
        is_exported: whether exports use this name (other programs' names are only read).
    """

    name: str
    param_names: tuple[str, ...]
    transform: Transform = IDENTITY
    is_exported: bool = True

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return "{expert}" in self.name


def _swiglu(prefix: str, target: str) -> list[TensorRule]:
    return [TensorRule(f"{prefix}.{part}_proj.weight", (f"{target}{part}",)) for part in ("gate", "up", "down")]


_NON_LAYER = [
    TensorRule("model.embed_tokens.weight", ("embed",)),
    TensorRule("model.norm.weight", ("norm",)),
    TensorRule("lm_head.weight", ("head",)),
]
_ATTENTION = [
    TensorRule("input_layernorm.weight", ("attn.norm",)),
    TensorRule("self_attn.q_a_proj.weight", ("attn.q_a",)),
    TensorRule("self_attn.q_a_layernorm.weight", ("attn.q_a_norm",)),
    TensorRule("self_attn.q_b_proj.weight", ("attn.q_b",)),
    TensorRule("self_attn.q_proj.weight", ("attn.q",)),
    TensorRule("self_attn.kv_a_proj_with_mqa.weight", ("attn.kv_a",)),
    TensorRule("self_attn.kv_a_layernorm.weight", ("attn.kv_a_norm",)),
    TensorRule("self_attn.kv_b_proj.weight", ("attn.k_b", "attn.v_b"), MERGED_HEADS),
    # MLX and GGUF store the two halves of kv_b_proj apart, the first one turned.
    TensorRule("self_attn.embed_q.weight", ("attn.k_b",), TRANSPOSED, is_exported=False),
    TensorRule("self_attn.unembed_out.weight", ("attn.v_b",), is_exported=False),
    TensorRule("self_attn.o_proj.weight", ("attn.o",)),
]
_DENSE = [*_ATTENTION, TensorRule("post_attention_layernorm.weight", ("mlp.norm",)), *_swiglu("mlp", "mlp.")]
_SPARSE = [
    *_ATTENTION,
    TensorRule("post_attention_layernorm.weight", ("moe.norm",)),
    TensorRule("mlp.gate.weight", ("moe.router",)),
    TensorRule("mlp.gate.e_score_correction_bias", ("moe.router_bias",)),
    *_swiglu("mlp.experts.{expert}", "moe."),
    TensorRule("mlp.experts.gate_up_proj", ("moe.gate", "moe.up"), is_exported=False),
    TensorRule("mlp.experts.down_proj", ("moe.down",), is_exported=False),
    # MLX and GGUF stack the experts.
    *[
        TensorRule(f"mlp.switch_mlp.{part}_proj.weight", (f"moe.{part}",), is_exported=False)
        for part in ("gate", "up", "down")
    ],
    *_swiglu("mlp.shared_experts", "moe.shared_"),
]
_MTP = [
    TensorRule("embed_tokens.weight", ("embed",)),
    TensorRule("enorm.weight", ("enorm",)),
    TensorRule("hnorm.weight", ("hnorm",)),
    TensorRule("eh_proj.weight", ("eh_proj",)),
    *_SPARSE,
    TensorRule("shared_head.norm.weight", ("norm",)),
    TensorRule("shared_head.head.weight", ("head",)),
]
TENSOR_RULES: dict[str, tuple[TensorRule, ...]] = {
    NON_LAYER: tuple(_NON_LAYER),
    "dense": tuple(_DENSE),
    "sparse": tuple(_SPARSE),
    MTP: tuple(_MTP),
}
_RULES_BY_NAME = {kind: {rule.name: rule for rule in rules} for kind, rules in TENSOR_RULES.items()}
_NUMBER = r"(0|[1-9]\d{0,5})"
_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)", re.DOTALL)
_EXPERT = re.compile(rf"(?<=mlp\.experts\.){_NUMBER}(?=\.)")


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A checkpoint tensor and the parameters it stands for.

    Attributes:
        name: in the checkpoint.
        rule: that it follows.
        leaves: that it fills, whole or (with ``expert``) one row of their first axis.
        expert: number of the expert, if it holds only one.
    """

    name: str
    rule: TensorRule
    leaves: tuple[Leaf, ...]
    expert: int | None = None

    @property
    def param_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what it fills."""
        return [leaf.shape if self.expert is None else leaf.shape[1:] for leaf in self.leaves]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape it must have."""
        return self.rule.transform.tensor_shape(self.param_shapes)

    def slots(self) -> Iterator[ParamSlot]:
        """Each slot it fills."""
        for leaf in self.leaves:
            for row in expert_slots(leaf) if self.expert is None else (self.expert,):
                yield (leaf.checkpoint_name, leaf.name, row)


ParamSlot = tuple[str, str, int | None]  # part, parameter, expert


def expert_slots(leaf: Leaf) -> Sequence[int | None]:
    """The separately filled rows of a leaf: its experts, or just the whole."""
    return range(leaf.shape[0]) if "experts" in leaf.spec.axes else (None,)


class TensorMatcher:
    """Finds the parameters of a checkpoint tensor under one config."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.leaves_by_checkpoint = {
            part: {leaf.name: leaf for leaf in members} for part, members in checkpoint_layout(cfg).items()
        }

    def match(self, name: str) -> CheckpointTensor | None:
        """The tensor's place, or ``None`` if this model has none of that name."""
        layer, inner = None, name
        if in_layer := _LAYER.fullmatch(name):
            layer, inner = int(in_layer[1]), in_layer[2]
        kind = self._layer_kind(layer)
        numbered = _EXPERT.search(inner)
        rule = _RULES_BY_NAME[kind].get(_EXPERT.sub("{expert}", inner)) if kind else None
        if rule is None or rule.per_expert != (numbered is not None):
            return None
        return self._make_tensor(name, rule, layer, int(numbered[0]) if numbered else None)

    def expected_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor of this model under the names of the real checkpoint, in its order."""
        layers = range(self.cfg.num_hidden_layers + self.cfg.num_nextn_predict_layers)
        head, *tail = TENSOR_RULES[NON_LAYER]
        yield from self._tensors_of_rule(head, None)
        for layer in layers:
            for group in _group_expert_rules(TENSOR_RULES[self._layer_kind(layer) or ""]):
                experts = range(self.cfg.n_routed_experts) if group[0].per_expert else (None,)
                for expert in experts:
                    for rule in group:
                        yield from self._tensors_of_rule(rule, layer, expert)
        for rule in tail:
            yield from self._tensors_of_rule(rule, None)

    def _tensors_of_rule(
        self, rule: TensorRule, layer: int | None, expert: int | None = None
    ) -> Iterator[CheckpointTensor]:
        inner = rule.name.replace("{expert}", str(expert))
        name = inner if layer is None else f"model.layers.{layer}.{inner}"
        tensor = self._make_tensor(name, rule, layer, expert)
        if tensor and rule.is_exported:
            yield tensor

    def _layer_kind(self, layer: int | None) -> str | None:
        if layer is None:
            return NON_LAYER
        if layer < self.cfg.num_hidden_layers:
            return self.cfg.mlp_layer_types[layer]
        return MTP if layer == self.cfg.num_hidden_layers and self.cfg.num_nextn_predict_layers else None

    def _make_tensor(
        self, name: str, rule: TensorRule, layer: int | None, expert: int | None
    ) -> CheckpointTensor | None:
        part = self.leaves_by_checkpoint[NON_LAYER if layer is None else layer_checkpoint_name(self.cfg, layer)]
        leaves = tuple(part[target] for target in rule.param_names if target in part)
        absent = len(leaves) < len(rule.param_names) or (expert or 0) >= self.cfg.n_routed_experts
        return None if absent else CheckpointTensor(name, rule, leaves, expert)


def _group_expert_rules(rules: Sequence[TensorRule]) -> Iterator[list[TensorRule]]:
    """Per-expert rules together, so that an expert's tensors lie side by side; all others alone."""
    experts = [rule for rule in rules if rule.per_expert]
    for rule in rules:
        if not rule.per_expert:
            yield [rule]
        elif rule is experts[0]:
            yield experts


def assign_tensors(
    cfg: Config, weights: Mapping[str, StoredWeight], aliases: Mapping[str, str]
) -> dict[ParamSlot, CheckpointTensor]:
    """Gives every slot of the parameter tree its checkpoint tensor.

    Args:
        cfg: of the model.
        weights: the checkpoint's tensors, without those that are known copies.
        aliases: expected names that are filled by another tensor (``Tensor.name`` is then that other name).

    Raises:
        CheckpointError: listing every unknown, missing and duplicate tensor and every wrong shape and dtype.
    """
    matcher = TensorMatcher(cfg)
    matched = {name: matcher.match(name) for name in weights}
    for name, origin in aliases.items():
        if tensor := matcher.match(name):
            matched[name] = dataclasses.replace(tensor, name=origin)
    found = {name: tensor for name, tensor in matched.items() if tensor}
    filled = [(slot, tensor) for tensor in found.values() for slot in tensor.slots()]
    _raise_mismatches(
        unknown=[name for name, tensor in matched.items() if tensor is None],
        missing=_missing(matcher, {slot for slot, _ in filled}),
        twice=_duplicates(filled),
        shapes=[_shape_problem(t, weights[t.name]) for t in found.values() if weights[t.name].shape != t.shape],
        dtypes=[_dtype_problem(n, e) for n, e in weights.items() if n in found and not _is_weight(e)],
    )
    return dict(filled)


def _missing(matcher: TensorMatcher, filled: set[ParamSlot]) -> list[str]:
    names = (tensor.name for tensor in matcher.expected_tensors() if not filled.issuperset(tensor.slots()))
    # A config may claim a billion experts.
    return list(itertools.islice(names, _MAX_MISSING))


def _duplicates(filled: Sequence[tuple[ParamSlot, CheckpointTensor]]) -> list[str]:
    counts = Counter(slot for slot, _ in filled)
    return sorted({tensor.name for slot, tensor in filled if counts[slot] > 1})


def _is_weight(entry: StoredWeight) -> bool:
    return entry.spec is not None or SAFETENSORS_DTYPE_NAMES[entry.dtype] in SAFETENSORS_FLOATS


def _shape_problem(tensor: CheckpointTensor, entry: StoredWeight) -> str:
    return f"{printable(tensor.name)} is {list(entry.shape)}, the config needs {list(tensor.shape)}"


def _dtype_problem(name: str, entry: StoredWeight) -> str:
    return f"{printable(name)} is {SAFETENSORS_DTYPE_NAMES[entry.dtype]}"


def _raise_mismatches(
    *, unknown: list[str], missing: list[str], twice: list[str], shapes: list[str], dtypes: list[str]
) -> None:
    groups = {
        "missing": missing,
        "unknown": [printable(name) for name in unknown],
        "given more than once": twice,
        "of the wrong shape": shapes,
        f"of a dtype that weights cannot have (known are {', '.join(SAFETENSORS_FLOATS)})": dtypes,
    }
    problems = [f"{_format_count(items)} {title}: {format_names(items)}" for title, items in groups.items() if items]
    if problems:
        raise CheckpointError("the checkpoint's tensors do not fit its config.json.\n  " + "\n  ".join(problems))


def _format_count(items: Sequence[str]) -> str:
    return f"{len(items)}" if len(items) < _MAX_MISSING else f"at least {_MAX_MISSING}"


def load_slot(tensor: CheckpointTensor, stored: StoredWeight, slot: ParamSlot) -> Any:
    """What fills a slot, out of a checkpoint tensor: a view, or a quantized weight repacked."""
    names = [leaf.name for leaf in tensor.leaves]
    # A fused or stacked tensor holds every expert.
    expert = None if tensor.expert is not None else slot[2]
    alone = expert is not None and len(tensor.leaves) == 1
    shapes = [shape[1:] for shape in tensor.param_shapes] if alone else tensor.param_shapes
    whole = tensor.rule.transform.split(stored.load(expert if alone else None), shapes)[names.index(slot[1])]
    return whole if expert is None or alone else whole[expert]


def slot_quant_spec(tensor: CheckpointTensor, stored: StoredWeight) -> QuantSpec | None:
    """How the slots that a checkpoint tensor fills are stored."""
    return tensor.rule.transform.param_quant_spec(stored.spec, stored.shape)
