"""Products of few rows with one matrix, or two side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays as noise
from pallas_kernels.quant_matmul import Made, Squares, linear
from pallas_kernels.quant_matmul.op import problem
from pallas_kernels.quant_matmul.reference import linear_ref
from pallas_kernels.specs.base import (
    COUNTERS,
    EPS,
    Arrays,
    Case,
    Sweep,
    Widths,
    one_layer,
    size_of,
    squares_of,
    view_made,
)
from pallas_kernels.tiles import Kind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product of a decode step, and what goes before and after it.

    Attributes:
        outputs: of the matrix.
        inputs: of it.
        other: outputs of a second matrix.
        normed: whether the factor of a norm goes into it.
        residual: whether it is added to the residual stream.
        next: whether a norm comes next.
        kind: the one storage that its matrix has.
    """

    outputs: int
    inputs: int
    other: int = 0
    normed: bool = False
    residual: bool = False
    next: bool = False
    kind: Kind | None = None

    @property
    def width(self) -> int:
        return self.outputs + self.other


def _products(w: Widths) -> dict[str, _Product]:
    return {
        "qkv_a": _Product(outputs=w.query_latent, inputs=w.hidden, other=w.latent + w.rope, normed=True, next=True),
        "o": _Product(outputs=w.hidden, inputs=w.heads * w.value, residual=True, next=True),
        "router": _Product(outputs=w.experts, inputs=w.hidden, normed=True, kind="bfloat16"),
        "dense_down": _Product(outputs=w.hidden, inputs=w.dense_width, residual=True, next=True),
        "logits": _Product(outputs=w.vocab, inputs=w.hidden),
    }


def linear_cases(sweep: Sweep) -> Iterator[Case]:
    """Every projection that is a product by itself, in every storage."""
    for name, product in _products(sweep.widths).items():
        for kind in (product.kind,) if product.kind else sweep.kinds:
            yield from (_case(sweep, name, product, kind, rows) for rows in sweep.rows)


def _case(sweep: Sweep, name: str, product: _Product, kind: Kind, rows: int) -> Case:
    # What only goes into another product has the dtype of the activations.
    dtype = sweep.dtype if product.normed and product.next else "float32"

    def make(layers: int) -> tuple[Arrays, Arrays]:
        given: Arrays = {
            "x": noise.normal((rows, product.inputs), 1, sweep.dtype),
            "weight": sweep.weight((layers, product.outputs, product.inputs), kind, 2),
            "other": sweep.weight((layers, product.other, product.inputs), kind, 4) if product.other else None,
            "squares": squares_of(rows, product.inputs) if product.normed else None,
            "residual": noise.normal((rows, product.width), 6) if product.residual else None,
            "next_norm": noise.normal((layers, product.width), 7, sweep.dtype) if product.next else None,
        }
        return given, {"counters": jnp.zeros(COUNTERS, jnp.int32)}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[Made, Arrays]:
        x, weight, rest = given["x"], given["weight"], {key: given[key] for key in _OPTIONS}
        made, counters = linear(x, weight, place, state["counters"], **rest, eps=EPS, dtype=dtype, shape=shape)
        return made, {"counters": counters}

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[Made, Arrays]:
        weights = [given["weight"]] if given["other"] is None else [given["weight"], given["other"]]
        options = {"squares": given["squares"], "residual": given["residual"], "eps": EPS, "dtype": jnp.float32}
        out = jnp.concatenate([linear_ref(given["x"], weight, place, **options).out for weight in weights], axis=1)
        scaled = out.astype(dtype)
        if product.next:
            scaled = (out * given["next_norm"][place[0]][None].astype(jnp.float32)).astype(sweep.dtype)
        return Made(out.astype(dtype), scaled, Squares(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1)), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        size, wide = (rows, product.width), jnp.float32
        activations = given["x"].nbytes + size_of(size, dtype) + product.residual * size_of(size, wide)
        return one_layer(given["weight"], given["other"]) + activations + product.next * size_of(size, sweep.dtype)

    full = f"{name}/{kind}/m{rows}"
    return Case(
        op="linear",
        name=full,
        make=make,
        run=run,
        reference=reference,
        view=view_made,
        moves="x",
        nbytes=nbytes,
        problem=lambda given: problem(rows, product.width, given["weight"]),
    )


_OPTIONS = ("other", "squares", "residual", "next_norm")
