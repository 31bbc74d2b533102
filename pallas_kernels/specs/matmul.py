"""Products of few rows with one matrix, or two side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels.quant_matmul import LinearOutput, SumSq, fused_linear
from pallas_kernels.quant_matmul.op import linear_tuning_key
from pallas_kernels.quant_matmul.reference import fused_linear_ref
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
    """A product of a decode step, and what goes before and after it.

    Attributes:
        outputs: of the matrix.
        inputs: of it.
        second_outputs: outputs of a second matrix.
        has_input_norm: whether the factor of a norm goes into it.
        has_residual: whether it is added to the residual stream.
        has_next_norm: whether a norm comes next.
        kind: the one storage that its matrix has.
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


def _projections(w: ModelDims) -> dict[str, _Projection]:
    return {
        "qkv_a": _Projection(
            outputs=w.query_latent,
            inputs=w.hidden,
            second_outputs=w.latent + w.rope,
            has_input_norm=True,
            has_next_norm=True,
        ),
        "o": _Projection(outputs=w.hidden, inputs=w.heads * w.value, has_residual=True, has_next_norm=True),
        "router": _Projection(outputs=w.experts, inputs=w.hidden, has_input_norm=True, kind="bfloat16"),
        "dense_down": _Projection(outputs=w.hidden, inputs=w.dense_width, has_residual=True, has_next_norm=True),
        "logits": _Projection(outputs=w.vocab, inputs=w.hidden),
    }


def fused_linear_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Every projection that is a product by itself, in every storage."""
    for name, product in _projections(sweep.dims).items():
        for kind in (product.kind,) if product.kind else sweep.weight_kinds:
            yield from (_fused_linear_spec(sweep, name, product, kind, rows) for rows in sweep.batch_sizes)


def _fused_linear_spec(sweep: Sweep, name: str, product: _Projection, kind: WeightKind, rows: int) -> KernelSpec:
    # What only goes into another product has the dtype of the activations.
    dtype = sweep.dtype if product.has_input_norm and product.has_next_norm else "float32"

    def make(layers: int) -> tuple[Arrays, Arrays]:
        given: Arrays = {
            "x": random_arrays.random_normal((rows, product.inputs), 1, sweep.dtype),
            "weight": sweep.random_weight((layers, product.outputs, product.inputs), kind, 2),
            "other": sweep.random_weight((layers, product.second_outputs, product.inputs), kind, 4)
            if product.second_outputs
            else None,
            "squares": unit_sum_sq(rows, product.inputs) if product.has_input_norm else None,
            "residual": random_arrays.random_normal((rows, product.width), 6) if product.has_residual else None,
            "next_norm": random_arrays.random_normal((layers, product.width), 7, sweep.dtype)
            if product.has_next_norm
            else None,
        }
        return given, {"counters": jnp.zeros(NUM_COUNTERS, jnp.int32)}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[LinearOutput, Arrays]:
        x, weight, rest = given["x"], given["weight"], {key: given[key] for key in _OPTION_KEYS}
        made, counters = fused_linear(x, weight, place, state["counters"], **rest, eps=EPS, dtype=dtype, config=shape)
        return made, {"counters": counters}

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[LinearOutput, Arrays]:
        weights = [given["weight"]] if given["other"] is None else [given["weight"], given["other"]]
        options = {"squares": given["squares"], "residual": given["residual"], "eps": EPS, "dtype": jnp.float32}
        out = jnp.concatenate(
            [fused_linear_ref(given["x"], weight, place, **options).out for weight in weights], axis=1
        )
        scaled = out.astype(dtype)
        if product.has_next_norm:
            scaled = (out * given["next_norm"][place[0]][None].astype(jnp.float32)).astype(sweep.dtype)
        return LinearOutput(out.astype(dtype), scaled, SumSq(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1)), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        size, wide = (rows, product.width), jnp.float32
        activations = given["x"].nbytes + array_nbytes(size, dtype) + product.has_residual * array_nbytes(size, wide)
        return (
            layer_nbytes(given["weight"], given["other"])
            + activations
            + product.has_next_norm * array_nbytes(size, sweep.dtype)
        )

    full = f"{name}/{kind}/m{rows}"
    return KernelSpec(
        op="linear",
        name=full,
        make_inputs=make,
        run=run,
        reference=reference,
        comparable_outputs=comparable_linear_output,
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda given: linear_tuning_key(rows, product.width, given["weight"]),
    )


_OPTION_KEYS = ("other", "squares", "residual", "next_norm")
