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

from glm_jax.checkpoint.folder.layout import MTP, REST, Leaf, layout, part_name
from glm_jax.checkpoint.formats.base import Stored
from glm_jax.checkpoint.mapping.transforms import HEADS, TRANSPOSED, WHOLE, Transform
from glm_jax.checkpoint.safetensors.header import NAMES, printable
from glm_jax.checkpoint.safetensors.reader import listing
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantSpec

_MOST_MISSING = 10_000
FLOATS = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One kind of checkpoint tensor.

    Attributes:
        name: within its layer (or whole, outside the layers); ``{expert}`` stands for a number.
        targets: parameters it fills, by name inside the part.
        transform: between the tensor and the parameters.
        written: whether exports use this name (other programs' names are only read).
    """

    name: str
    targets: tuple[str, ...]
    transform: Transform = WHOLE
    written: bool = True

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return "{expert}" in self.name


def _swiglu(prefix: str, target: str) -> list[Rule]:
    return [Rule(f"{prefix}.{part}_proj.weight", (f"{target}{part}",)) for part in ("gate", "up", "down")]


_REST = [
    Rule("model.embed_tokens.weight", ("embed",)),
    Rule("model.norm.weight", ("norm",)),
    Rule("lm_head.weight", ("head",)),
]
_ATTENTION = [
    Rule("input_layernorm.weight", ("attn.norm",)),
    Rule("self_attn.q_a_proj.weight", ("attn.q_a",)),
    Rule("self_attn.q_a_layernorm.weight", ("attn.q_a_norm",)),
    Rule("self_attn.q_b_proj.weight", ("attn.q_b",)),
    Rule("self_attn.q_proj.weight", ("attn.q",)),
    Rule("self_attn.kv_a_proj_with_mqa.weight", ("attn.kv_a",)),
    Rule("self_attn.kv_a_layernorm.weight", ("attn.kv_a_norm",)),
    Rule("self_attn.kv_b_proj.weight", ("attn.k_b", "attn.v_b"), HEADS),
    # MLX and GGUF store the two halves of kv_b_proj apart, the first one turned.
    Rule("self_attn.embed_q.weight", ("attn.k_b",), TRANSPOSED, written=False),
    Rule("self_attn.unembed_out.weight", ("attn.v_b",), written=False),
    Rule("self_attn.o_proj.weight", ("attn.o",)),
]
_DENSE = [*_ATTENTION, Rule("post_attention_layernorm.weight", ("mlp.norm",)), *_swiglu("mlp", "mlp.")]
_SPARSE = [
    *_ATTENTION,
    Rule("post_attention_layernorm.weight", ("moe.norm",)),
    Rule("mlp.gate.weight", ("moe.router",)),
    Rule("mlp.gate.e_score_correction_bias", ("moe.router_bias",)),
    *_swiglu("mlp.experts.{expert}", "moe."),
    Rule("mlp.experts.gate_up_proj", ("moe.gate", "moe.up"), written=False),
    Rule("mlp.experts.down_proj", ("moe.down",), written=False),
    # MLX and GGUF stack the experts.
    *[Rule(f"mlp.switch_mlp.{part}_proj.weight", (f"moe.{part}",), written=False) for part in ("gate", "up", "down")],
    *_swiglu("mlp.shared_experts", "moe.shared_"),
]
_PREDICTION = [
    Rule("embed_tokens.weight", ("embed",)),
    Rule("enorm.weight", ("enorm",)),
    Rule("hnorm.weight", ("hnorm",)),
    Rule("eh_proj.weight", ("eh_proj",)),
    *_SPARSE,
    Rule("shared_head.norm.weight", ("norm",)),
    Rule("shared_head.head.weight", ("head",)),
]
TABLES: dict[str, tuple[Rule, ...]] = {
    REST: tuple(_REST),
    "dense": tuple(_DENSE),
    "sparse": tuple(_SPARSE),
    MTP: tuple(_PREDICTION),
}
_BY_NAME = {kind: {rule.name: rule for rule in rules} for kind, rules in TABLES.items()}
_NUMBER = r"(0|[1-9]\d{0,5})"
_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)", re.DOTALL)
_EXPERT = re.compile(rf"(?<=mlp\.experts\.){_NUMBER}(?=\.)")


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A checkpoint tensor and the parameters it stands for.

    Attributes:
        name: in the checkpoint.
        rule: that it follows.
        leaves: that it fills, whole or (with ``expert``) one row of their first axis.
        expert: number of the expert, if it holds only one.
    """

    name: str
    rule: Rule
    leaves: tuple[Leaf, ...]
    expert: int | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what it fills."""
        return [leaf.shape if self.expert is None else leaf.shape[1:] for leaf in self.leaves]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape it must have."""
        return self.rule.transform.shape(self.shapes)

    def fills(self) -> Iterator[Slot]:
        """Each slot it fills."""
        for leaf in self.leaves:
            for row in slots(leaf) if self.expert is None else (self.expert,):
                yield (leaf.part, leaf.name, row)


Slot = tuple[str, str, int | None]  # part, parameter, expert


def slots(leaf: Leaf) -> Sequence[int | None]:
    """The separately filled rows of a leaf: its experts, or just the whole."""
    return range(leaf.shape[0]) if "experts" in leaf.spec.axes else (None,)


class Matcher:
    """Finds the parameters of a checkpoint tensor under one config."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.parts = {part: {leaf.name: leaf for leaf in members} for part, members in layout(cfg).items()}

    def match(self, name: str) -> Tensor | None:
        """The tensor's place, or ``None`` if this model has none of that name."""
        layer, inner = None, name
        if in_layer := _LAYER.fullmatch(name):
            layer, inner = int(in_layer[1]), in_layer[2]
        kind = self._kind(layer)
        numbered = _EXPERT.search(inner)
        rule = _BY_NAME[kind].get(_EXPERT.sub("{expert}", inner)) if kind else None
        if rule is None or rule.per_expert != (numbered is not None):
            return None
        return self._tensor(name, rule, layer, int(numbered[0]) if numbered else None)

    def expected(self) -> Iterator[Tensor]:
        """Every tensor of this model under the names of the real checkpoint, in its order."""
        layers = range(self.cfg.num_hidden_layers + self.cfg.num_nextn_predict_layers)
        head, *tail = TABLES[REST]
        yield from self._of_rule(head, None)
        for layer in layers:
            for group in _grouped(TABLES[self._kind(layer) or ""]):
                experts = range(self.cfg.n_routed_experts) if group[0].per_expert else (None,)
                for expert in experts:
                    for rule in group:
                        yield from self._of_rule(rule, layer, expert)
        for rule in tail:
            yield from self._of_rule(rule, None)

    def _of_rule(self, rule: Rule, layer: int | None, expert: int | None = None) -> Iterator[Tensor]:
        inner = rule.name.replace("{expert}", str(expert))
        name = inner if layer is None else f"model.layers.{layer}.{inner}"
        tensor = self._tensor(name, rule, layer, expert)
        if tensor and rule.written:
            yield tensor

    def _kind(self, layer: int | None) -> str | None:
        if layer is None:
            return REST
        if layer < self.cfg.num_hidden_layers:
            return self.cfg.mlp_layer_types[layer]
        return MTP if layer == self.cfg.num_hidden_layers and self.cfg.num_nextn_predict_layers else None

    def _tensor(self, name: str, rule: Rule, layer: int | None, expert: int | None) -> Tensor | None:
        part = self.parts[REST if layer is None else part_name(self.cfg, layer)]
        leaves = tuple(part[target] for target in rule.targets if target in part)
        absent = len(leaves) < len(rule.targets) or (expert or 0) >= self.cfg.n_routed_experts
        return None if absent else Tensor(name, rule, leaves, expert)


def _grouped(rules: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Per-expert rules together, so that an expert's tensors lie side by side; all others alone."""
    experts = [rule for rule in rules if rule.per_expert]
    for rule in rules:
        if not rule.per_expert:
            yield [rule]
        elif rule is experts[0]:
            yield experts


def assign(cfg: Config, entries: Mapping[str, Stored], aliases: Mapping[str, str]) -> dict[Slot, Tensor]:
    """Gives every slot of the parameter tree its checkpoint tensor.

    Args:
        cfg: of the model.
        entries: the checkpoint's tensors, without those that are known copies.
        aliases: expected names that are filled by another tensor (``Tensor.name`` is then that other name).

    Raises:
        CheckpointError: listing every unknown, missing and duplicate tensor and every wrong shape and dtype.
    """
    matcher = Matcher(cfg)
    matched = {name: matcher.match(name) for name in entries}
    for name, origin in aliases.items():
        if tensor := matcher.match(name):
            matched[name] = dataclasses.replace(tensor, name=origin)
    found = {name: tensor for name, tensor in matched.items() if tensor}
    filled = [(slot, tensor) for tensor in found.values() for slot in tensor.fills()]
    _report(
        unknown=[name for name, tensor in matched.items() if tensor is None],
        missing=_missing(matcher, {slot for slot, _ in filled}),
        twice=_twice(filled),
        shapes=[_shape_problem(t, entries[t.name]) for t in found.values() if entries[t.name].shape != t.shape],
        dtypes=[_dtype_problem(n, e) for n, e in entries.items() if n in found and not _is_weight(e)],
    )
    return dict(filled)


def _missing(matcher: Matcher, filled: set[Slot]) -> list[str]:
    names = (tensor.name for tensor in matcher.expected() if not filled.issuperset(tensor.fills()))
    # A config may claim a billion experts.
    return list(itertools.islice(names, _MOST_MISSING))


def _twice(filled: Sequence[tuple[Slot, Tensor]]) -> list[str]:
    counts = Counter(slot for slot, _ in filled)
    return sorted({tensor.name for slot, tensor in filled if counts[slot] > 1})


def _is_weight(entry: Stored) -> bool:
    return entry.spec is not None or NAMES[entry.dtype] in FLOATS


def _shape_problem(tensor: Tensor, entry: Stored) -> str:
    return f"{printable(tensor.name)} is {list(entry.shape)}, the config needs {list(tensor.shape)}"


def _dtype_problem(name: str, entry: Stored) -> str:
    return f"{printable(name)} is {NAMES[entry.dtype]}"


def _report(*, unknown: list[str], missing: list[str], twice: list[str], shapes: list[str], dtypes: list[str]) -> None:
    groups = {
        "missing": missing,
        "unknown": [printable(name) for name in unknown],
        "given more than once": twice,
        "of the wrong shape": shapes,
        f"of a dtype that weights cannot have (known are {', '.join(FLOATS)})": dtypes,
    }
    problems = [f"{_count(items)} {title}: {listing(items)}" for title, items in groups.items() if items]
    if problems:
        raise CheckpointError("the checkpoint's tensors do not fit its config.json.\n  " + "\n  ".join(problems))


def _count(items: Sequence[str]) -> str:
    return f"{len(items)}" if len(items) < _MOST_MISSING else f"at least {_MOST_MISSING}"


def load(tensor: Tensor, stored: Stored, slot: Slot) -> Any:
    """What fills a slot, out of a checkpoint tensor: a view, or a quantised weight repacked."""
    names = [leaf.name for leaf in tensor.leaves]
    # A fused or stacked tensor holds every expert.
    expert = None if tensor.expert is not None else slot[2]
    alone = expert is not None and len(tensor.leaves) == 1
    shapes = [shape[1:] for shape in tensor.shapes] if alone else tensor.shapes
    whole = tensor.rule.transform.split(stored.load(expert if alone else None), shapes)[names.index(slot[1])]
    return whole if expert is None or alone else whole[expert]


def slot_storage(tensor: Tensor, stored: Stored) -> QuantSpec | None:
    """How the slots that a checkpoint tensor fills are stored."""
    return tensor.rule.transform.storage(stored.spec, stored.shape)
