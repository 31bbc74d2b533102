"""Which weights of a model are stored how: a spec for each kind of matrix, and presets by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from glm_jax.errors import QuantError
from glm_jax.weights.quant_spec import QuantSpec

_INT8 = QuantSpec(kind="int8", block=(1, 0))
_INT4 = QuantSpec(kind="int4", block=(1, 64))
_MIN_GROUP_SIZE = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantRules:
    """The storage of each kind of matrix; None keeps it in the model's dtype.

    Router, norms and the router's bias are never quantized: they are small, and they decide.

    Attributes:
        experts: routed experts, nine tenths of the parameters.
        shared_experts: the always-on expert of each layer.
        dense_mlp: the feed-forward of dense layers.
        attention: the projections of the attention.
        head: of the vocabulary.
        embedding: of the vocabulary (also the head where the two are tied).
        mtp: every matrix of the prediction layer; "same" treats them as those of any other layer.
    """

    experts: QuantSpec | None = None
    shared_experts: QuantSpec | None = None
    dense_mlp: QuantSpec | None = None
    attention: QuantSpec | None = None
    head: QuantSpec | None = None
    embedding: QuantSpec | None = None
    mtp: QuantSpec | Literal["same"] | None = "same"

    def spec_for(self, path: tuple[str, ...]) -> QuantSpec | None:
        """The storage of the parameter at a path of the tree (of a matrix: norms and biases are not asked for)."""
        name = path[-1]
        if name.startswith("router"):
            return None
        if path[0] == "mtp" and self.mtp != "same":
            return self.mtp
        if name in ("embed", "head"):
            return self.embedding if name == "embed" else self.head
        block = path[-2]
        if block == "moe":
            return self.shared_experts if name.startswith("shared_") else self.experts
        return self.dense_mlp if block == "mlp" else self.attention

    @classmethod
    def resolve(cls, rules: str | Self | None) -> Self | None:
        """Rules by the name of a preset.

        Raises:
            QuantError: listing the presets there are.
        """
        if not isinstance(rules, str):
            return rules
        if rules not in QUANT_PRESETS:
            raise QuantError(f"no quantization {rules!r}; there are {', '.join(QUANT_PRESETS)}")
        return cast(Self, QUANT_PRESETS[rules])

    def to_json(self) -> dict[str, Any]:
        """Plain values; :meth:`from_json` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.to_json() if isinstance(value, QuantSpec) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """From plain values.

        Raises:
            QuantError: for anything that :meth:`dump_prompt_json` does not make.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            raise QuantError(f"quantization rules have {', '.join(names)}, not {value!r}")
        as_given = {key: spec for key, spec in value.items() if spec is None or (key == "mtp" and spec == "same")}
        parsed = {key: QuantSpec.from_json(spec) for key, spec in value.items() if key not in as_given}
        return cls(**as_given, **parsed)


QUANT_PRESETS: dict[str, QuantRules] = {
    # Experts are nine tenths of the bytes, and at batch 1 half of what a token reads; the rest is in eight bits.
    "int4": QuantRules(
        experts=_INT4, shared_experts=_INT8, dense_mlp=_INT8, attention=_INT8, head=_INT8, embedding=_INT8
    ),
    "int4-small": QuantRules(
        experts=_INT4, shared_experts=_INT4, dense_mlp=_INT4, attention=_INT4, head=_INT4, embedding=_INT4
    ),
    "int4-experts": QuantRules(experts=_INT4),
    "int8": QuantRules(
        experts=_INT8, shared_experts=_INT8, dense_mlp=_INT8, attention=_INT8, head=_INT8, embedding=_INT8
    ),
}


def fit_group_size(spec: QuantSpec, shape: tuple[int, ...], local_inputs: int | None = None) -> QuantSpec | None:
    """The spec with groups that divide a matrix, halved as often as it takes; None if none of 8 or more does.

    Args:
        spec: asked for.
        shape: of the weight.
        local_inputs: inputs on one device, where they are split: no group may cross from one to the next.
    """
    inputs = local_inputs or shape[-1]
    rows, columns = spec.block
    if inputs % spec.values_per_byte or (rows and shape[-2] % rows):
        return None
    if not columns:
        return spec
    while inputs % columns:
        columns //= 2
        if columns < _MIN_GROUP_SIZE:
            return None
    return dataclasses.replace(spec, block=(spec.block[0], columns))
