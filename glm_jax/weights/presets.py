"""Quantization rules of a model: a spec for each kind of matrix, and presets by name."""

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
    """The quantization of each kind of matrix; None keeps the model's dtype.

    Routers, router biases and norms are never quantized: they are small, and an error in them changes which experts
    run.

    Attributes:
        experts: Routed experts, nine tenths of the parameters.
        shared_experts: The shared experts of each layer.
        dense_mlp: The feed-forward of dense layers.
        attention: The projections of the attention.
        head: The output head.
        embedding: The token embedding (also the head where the two are tied).
        mtp: Every matrix of the prediction layer; "same" treats them like those of other layers.
    """

    experts: QuantSpec | None = None
    shared_experts: QuantSpec | None = None
    dense_mlp: QuantSpec | None = None
    attention: QuantSpec | None = None
    head: QuantSpec | None = None
    embedding: QuantSpec | None = None
    mtp: QuantSpec | Literal["same"] | None = "same"

    def spec_for(self, path: tuple[str, ...]) -> QuantSpec | None:
        """The quantization of the matrix at a path of the parameter tree; None keeps the model's dtype."""
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
        """The rules of a preset; rules and None are returned unchanged.

        Raises:
            QuantError: For an unknown name, listing the presets.
        """
        if not isinstance(rules, str):
            return rules
        if rules not in QUANT_PRESETS:
            raise QuantError(f"no quantization {rules!r}; there are {', '.join(QUANT_PRESETS)}")
        return cast(Self, QUANT_PRESETS[rules])

    def to_json(self) -> dict[str, Any]:
        """The rules as JSON values; :meth:`from_json` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.to_json() if isinstance(value, QuantSpec) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads the JSON values that :meth:`to_json` writes.

        Raises:
            QuantError: For any other value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            raise QuantError(f"quantization rules have {', '.join(names)}, not {value!r}")
        literals = {key: spec for key, spec in value.items() if spec is None or (key == "mtp" and spec == "same")}
        parsed = {key: QuantSpec.from_json(spec) for key, spec in value.items() if key not in literals}
        return cls(**literals, **parsed)


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
    """Halves the group size of a spec until groups divide the matrix; None if no size of 8 or more does.

    Args:
        spec: Requested quantization.
        shape: Shape of the weight.
        local_inputs: Inputs on one device where they are split over devices; no group crosses a device boundary.
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
