"""Products of few rows with one matrix, or with two side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels._implementation import Implementation
from pallas_kernels.quant_matmul import LinearOutput, fused_linear
from pallas_kernels.quant_matmul.config import LinearConfig
from pallas_kernels.quant_matmul.op import linear_tuning_key
from pallas_kernels.specs.base import (
    EPS,
    NUM_COUNTERS,
    Arrays,
    KernelSpec,
    ModelDims,
    Sweep,
    array_nbytes,
    comparable_linear_output,
    layer_nbytes,
    unit_sum_sq,
)
from pallas_kernels.tiles import WeightKind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """A product of a decode step, with the operations that are fused with it.

    Attributes:
        outputs: Outputs of the matrix.
        inputs: Inputs of the matrix.
        second_outputs: Outputs of a second matrix; 0 for none.
        has_input_norm: Whether the rows are normalized before.
        has_residual: Whether the product is added to the residual stream.
        has_next_norm: Whether a norm reads the result.
        kind: Storage of the matrix, if only one occurs.
    """

    outputs: int
    inputs: int
    second_outputs: int = 0
    has_input_norm: bool = False
    has_residual: bool = False
    has_next_norm: bool = False
    kind: WeightKind | None = None

    @property
    def width(self) -> int:
        return self.outputs + self.second_outputs


def _projections(dims: ModelDims) -> dict[str, _Projection]:
    return {
        "qkv_a": _Projection(
            outputs=dims.query_latent,
            inputs=dims.hidden,
            second_outputs=dims.latent + dims.rope,
            has_input_norm=True,
            has_next_norm=True,
        ),
        "o": _Projection(outputs=dims.hidden, inputs=dims.heads * dims.value, has_residual=True, has_next_norm=True),
        "router": _Projection(outputs=dims.experts, inputs=dims.hidden, has_input_norm=True, kind="bfloat16"),
        "dense_down": _Projection(outputs=dims.hidden, inputs=dims.dense_width, has_residual=True, has_next_norm=True),
        "logits": _Projection(outputs=dims.vocab, inputs=dims.hidden),
    }


def fused_linear_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields every projection that is a kernel by itself, in every storage."""
    for name, projection in _projections(sweep.dims).items():
        for kind in (projection.kind,) if projection.kind else sweep.weight_kinds:
            yield from (_fused_linear_spec(sweep, name, projection, kind, rows) for rows in sweep.batch_sizes)


def _fused_linear_spec(sweep: Sweep, name: str, projection: _Projection, kind: WeightKind, rows: int) -> KernelSpec:
    # A result that only another product reads has the dtype of the activations.
    dtype = sweep.dtype if projection.has_input_norm and projection.has_next_norm else "float32"
    width = projection.width

    def make(layers: int) -> tuple[Arrays, Arrays]:
        inputs: Arrays = dict.fromkeys(("second_weight", "sum_sq", "residual", "next_norm"))
        inputs["x"] = random_arrays.random_normal((rows, projection.inputs), 1, sweep.dtype)
        inputs["weight"] = sweep.random_weight((layers, projection.outputs, projection.inputs), kind, 2)
        if projection.second_outputs:
            shape = (layers, projection.second_outputs, projection.inputs)
            inputs["second_weight"] = sweep.random_weight(shape, kind, 4)
        if projection.has_input_norm:
            inputs["sum_sq"] = unit_sum_sq(rows, projection.inputs)
        if projection.has_residual:
            inputs["residual"] = random_arrays.random_normal((rows, width), 6)
        if projection.has_next_norm:
            inputs["next_norm"] = random_arrays.random_normal((layers, width), 7, sweep.dtype)
        return inputs, {"counters": jnp.zeros(NUM_COUNTERS, jnp.int32)}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: LinearConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[LinearOutput, Arrays]:
        options = {"eps": EPS, "dtype": dtype, "config": config, "implementation": implementation}
        result, counters = fused_linear(layer_index=layer_index, counters=state["counters"], **inputs, **options)
        return result, {"counters": counters}

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        total = layer_nbytes(inputs["weight"], inputs["second_weight"]) + inputs["x"].nbytes
        total += array_nbytes((rows, width), dtype)
        total += projection.has_residual * array_nbytes((rows, width), jnp.float32)
        return total + projection.has_next_norm * array_nbytes((rows, width), sweep.dtype)

    return KernelSpec(
        op="linear",
        name=f"{name}/{kind}/m{rows}",
        make_inputs=make,
        run=run,
        comparable_outputs=comparable_linear_output,
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: linear_tuning_key(rows, width, inputs["weight"]),
    )
