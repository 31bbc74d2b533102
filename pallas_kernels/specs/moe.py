"""Experts of few tokens: the two halves of a feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import random_arrays as noise
from pallas_kernels.moe import Plan, Routed, down, gate_up, sort_pairs
from pallas_kernels.moe.op import problem
from pallas_kernels.moe.reference import choose_ref, down_ref, gate_up_ref
from pallas_kernels.quant_matmul import Made
from pallas_kernels.specs.base import COUNTERS, EPS, Arrays, Case, Sweep, one_layer, size_of, squares_of, view_made
from pallas_kernels.tiles import Kind

# As models have it: more tokens are sorted by their experts.
MOST_UNSORTED = 8


def gate_up_cases(sweep: Sweep) -> Iterator[Case]:
    """Gate, up and their product, of experts with a shared one, in every storage."""
    yield from (_gate_up(sweep, kind, rows) for kind in sweep.kinds for rows in sweep.rows)


def down_cases(sweep: Sweep) -> Iterator[Case]:
    """Down and the sum over experts."""
    yield from (_down(sweep, kind, rows) for kind in sweep.kinds for rows in sweep.rows)


def _routed(sweep: Sweep) -> Routed:
    return Routed(experts=sweep.widths.experts, chosen=sweep.widths.chosen, normalised=True, factor=1.8)


def _choice(sweep: Sweep, layers: int, rows: int) -> Arrays:
    """The router's logits, the same for every layer; its bias is small, and decides nothing."""
    logits = noise.normal((rows, sweep.widths.experts), 11)
    return {"logits": logits, "bias": jnp.zeros((layers, sweep.widths.experts), jnp.float32)}


def _plan(routed: Routed, choice: Arrays) -> Plan | None:
    """The pairs in blocks, where a model would sort them."""
    if choice["logits"].shape[0] <= MOST_UNSORTED:
        return None
    return sort_pairs(routed, jnp.zeros(1, jnp.int32), choice["logits"], choice["bias"])


def _every_pair(routed: Routed, choice: Arrays) -> Plan:
    """The same with each pair for itself."""
    numbers, weights = choose_ref(routed, choice["logits"], choice["bias"][0])
    return Plan(numbers.reshape(-1).astype(jnp.int32), weights.reshape(-1))


def _distinct(routed: Routed, given: Arrays) -> int:
    """Experts that any token has chosen."""
    return len(np.unique(choose_ref(routed, given["logits"], given["bias"][0])[0]))


def _shared_kind(kind: Kind) -> Kind:
    """A shared expert is kept in 8 bits where the others have 4."""
    return "int8" if kind == "int4" else kind


def _gate_up(sweep: Sweep, kind: Kind, rows: int) -> Case:
    w, routed = sweep.widths, _routed(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        choice = _choice(sweep, layers, rows)
        experts, shared = (layers, w.experts, w.expert_width, w.hidden), (layers, w.expert_width, w.hidden)
        return {
            "x": noise.normal((rows, w.hidden), 1, sweep.dtype),
            "squares": squares_of(rows, w.hidden),
            "gate": sweep.weight(experts, kind, 2),
            "up": sweep.weight(experts, kind, 4),
            "shared": tuple(sweep.weight(shared, _shared_kind(kind), seed) for seed in (6, 8)),
            "plan": _plan(routed, choice),
            **choice,
        }, {}

    def call(function: Any, given: Arrays, place: jax.Array, **options: Any) -> jax.Array:
        names = ("logits", "bias", "gate", "up", "shared")
        return function(routed, given["x"], given["squares"], place, *map(given.get, names), eps=EPS, **options)

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[jax.Array, Arrays]:
        made, _ = call(gate_up, given, place, plan=given["plan"], **({"shape": shape} if shape else {}))
        return made, state

    def nbytes(given: Arrays, state: Arrays) -> int:
        read = one_layer(given["gate"], given["up"]) * _distinct(routed, given) // w.experts
        made = size_of((rows, w.chosen + 1, w.expert_width), sweep.dtype)
        return read + one_layer(*given["shared"]) + given["x"].nbytes + made

    return Case(
        op="gate_up",
        name=f"{kind}/m{rows}",
        make=make,
        run=run,
        reference=lambda given, state, place: (call(gate_up_ref, given, place), state),
        view=lambda given, out, state, place: (out,),
        moves="x",
        nbytes=nbytes,
        problem=lambda given: problem("gate_up", routed, rows, given["gate"], given["shared"][0]),
    )


def _down(sweep: Sweep, kind: Kind, rows: int) -> Case:
    w, routed = sweep.widths, _routed(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        choice = _choice(sweep, layers, rows)
        return {
            "h": noise.normal((rows * (w.chosen + 1) * w.expert_width,), 1, sweep.dtype),
            "weight": sweep.weight((layers, w.experts, w.hidden, w.expert_width), kind, 2),
            "shared": sweep.weight((layers, w.hidden, w.expert_width), _shared_kind(kind), 4),
            "residual": noise.normal((rows, w.hidden), 6),
            "next_norm": noise.normal((layers, w.hidden), 7, sweep.dtype),
            "plan": _plan(routed, choice) or _every_pair(routed, choice),
            **choice,
        }, {"counters": jnp.zeros(COUNTERS, jnp.int32)}

    names = ("weight", "shared", "residual", "next_norm")

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[Made, Arrays]:
        rest, options = [*(given[name] for name in names), state["counters"]], {"shape": shape} if shape else {}
        made, counters = down(routed, given["h"], given["plan"], place, *rest, **options)
        return made, {"counters": counters}

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[Made, Arrays]:
        rest = [given[name] for name in ("logits", "bias", *names)]
        return down_ref(routed, given["h"], place, *rest), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        read = one_layer(given["weight"]) * _distinct(routed, given) // w.experts
        made = size_of((rows, w.hidden), jnp.float32) + size_of((rows, w.hidden), sweep.dtype)
        return read + one_layer(given["shared"]) + given["h"].nbytes + given["residual"].nbytes + made

    return Case(
        op="down",
        name=f"{kind}/m{rows}",
        make=make,
        run=run,
        reference=reference,
        view=view_made,
        moves="h",
        nbytes=nbytes,
        problem=lambda given: problem("down", routed, rows, given["weight"], given["shared"]),
    )
