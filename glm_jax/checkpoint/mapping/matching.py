"""Matches checkpoint tensor names with the rules, and lists the tensors that a config needs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, Leaf, checkpoint_layout, layer_checkpoint_name
from glm_jax.checkpoint.mapping.rules import TENSOR_RULES, TensorRule
from glm_jax.config import Config

_RULES_BY_NAME = {kind: {rule.name: rule for rule in rules} for kind, rules in TENSOR_RULES.items()}
_NUMBER = r"(0|[1-9]\d{0,5})"
_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)", re.DOTALL)
_EXPERT = re.compile(rf"(?<=mlp\.experts\.){_NUMBER}(?=\.)")


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A checkpoint tensor and the parameters that it fills.

    Attributes:
        name: Name of the tensor in the checkpoint.
        rule: Rule that the tensor matches.
        leaves: Parameters that the tensor fills: all of them, or one entry of their leading axis if ``expert`` is set.
        expert: Number of the expert if the tensor holds only one expert.
    """

    name: str
    rule: TensorRule
    leaves: tuple[Leaf, ...]
    expert: int | None = None

    @property
    def param_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the arrays that the tensor fills, without the axis of experts if it holds only one expert."""
        return [leaf.shape if self.expert is None else leaf.shape[1:] for leaf in self.leaves]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the tensor must have."""
        return self.rule.transform.tensor_shape(self.param_shapes)

    def slots(self) -> Iterator[ParamSlot]:
        """Slots that the tensor fills."""
        for leaf in self.leaves:
            if self.expert is None:
                yield from leaf_slots(leaf)
            else:
                yield ParamSlot(leaf.checkpoint_name, leaf.name, self.expert)


class ParamSlot(NamedTuple):
    """A part of a parameter that is filled separately: one expert, or the whole parameter.

    Attributes:
        checkpoint_name: Layer checkpoint of the parameter.
        param_name: Name of the parameter within its layer checkpoint.
        expert: Number of the expert; None if the parameter has no axis of experts.
    """

    checkpoint_name: str
    param_name: str
    expert: int | None


def leaf_slots(leaf: Leaf) -> Iterator[ParamSlot]:
    """Slots of a leaf: one per expert, or one for the whole leaf."""
    experts = range(leaf.shape[0]) if "experts" in leaf.spec.axes else (None,)
    return (ParamSlot(leaf.checkpoint_name, leaf.name, expert) for expert in experts)


class TensorMatcher:
    """Finds the parameters of checkpoint tensors under one config.

    Args:
        cfg: Config of the model.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._leaves_by_checkpoint = {
            name: {leaf.name: leaf for leaf in leaves} for name, leaves in checkpoint_layout(cfg).items()
        }

    def match(self, name: str) -> CheckpointTensor | None:
        """Parameters of the tensor of this name, or ``None`` if the model has no such tensor."""
        layer, inner = None, name
        if layer_match := _LAYER.fullmatch(name):
            layer, inner = int(layer_match[1]), layer_match[2]
        kind = self._layer_kind(layer)
        expert_match = _EXPERT.search(inner)
        rule = _RULES_BY_NAME[kind].get(_EXPERT.sub("{expert}", inner)) if kind else None
        if rule is None or rule.per_expert != (expert_match is not None):
            return None
        return self._make_tensor(name, rule, layer, int(expert_match[0]) if expert_match else None)

    def expected_tensors(self) -> Iterator[CheckpointTensor]:
        """All tensors of this model, under the names and in the order of the published checkpoint."""
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
        checkpoint_name = NON_LAYER if layer is None else layer_checkpoint_name(self.cfg, layer)
        leaves_by_name = self._leaves_by_checkpoint[checkpoint_name]
        leaves = tuple(leaves_by_name[param] for param in rule.param_names if param in leaves_by_name)
        absent = len(leaves) < len(rule.param_names) or (expert or 0) >= self.cfg.n_routed_experts
        return None if absent else CheckpointTensor(name, rule, leaves, expert)


def _group_expert_rules(rules: Sequence[TensorRule]) -> Iterator[list[TensorRule]]:
    """Puts all per-expert rules into one group, so that an expert's tensors are neighbors; other rules stay alone."""
    experts = [rule for rule in rules if rule.per_expert]
    for rule in rules:
        if not rule.per_expert:
            yield [rule]
        elif rule is experts[0]:
            yield experts
