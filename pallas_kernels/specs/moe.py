"""Experts of few tokens: the two halves of a feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import random_arrays
from pallas_kernels.moe import Dispatch, RouterConfig, build_dispatch, down, gate_up
from pallas_kernels.moe.op import moe_tuning_key
from pallas_kernels.moe.reference import down_ref, gate_up_ref, route_ref
from pallas_kernels.quant_matmul import LinearOutput
from pallas_kernels.specs.base import (
    EPS,
    NUM_COUNTERS,
    Arrays,
    KernelSpec,
    Sweep,
    array_nbytes,
    comparable_linear_output,
    layer_nbytes,
    unit_sum_sq,
)
from pallas_kernels.tiles import WeightKind

# As models have it: more tokens are sorted by their experts.
MAX_UNSORTED_TOKENS = 8


def gate_up_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Gate, up and their product, of experts with a shared one, in every storage."""
    yield from (_gate_up_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def down_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Down and the sum over experts."""
    yield from (_down_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def _router_config(sweep: Sweep) -> RouterConfig:
    return RouterConfig(
        experts=sweep.dims.experts,
        experts_per_token=sweep.dims.experts_per_token,
        normalize_weights=True,
        scaling_factor=1.8,
    )


def _router_inputs(sweep: Sweep, layers: int, rows: int) -> Arrays:
    """The router's logits, the same for every layer; its bias is small, and decides nothing."""
    logits = random_arrays.random_normal((rows, sweep.dims.experts), 11)
    return {"logits": logits, "bias": jnp.zeros((layers, sweep.dims.experts), jnp.float32)}


def _sorted_dispatch(routed: RouterConfig, choice: Arrays) -> Dispatch | None:
    """The pairs in blocks, where a model would sort them."""
    if choice["logits"].shape[0] <= MAX_UNSORTED_TOKENS:
        return None
    return build_dispatch(routed, jnp.zeros(1, jnp.int32), choice["logits"], choice["bias"])


def _unsorted_dispatch(routed: RouterConfig, choice: Arrays) -> Dispatch:
    """The same with each pair for itself."""
    numbers, weights = route_ref(routed, choice["logits"], choice["bias"][0])
    return Dispatch(numbers.reshape(-1).astype(jnp.int32), weights.reshape(-1))


def _count_active_experts(routed: RouterConfig, given: Arrays) -> int:
    """Experts that any token has chosen."""
    return len(np.unique(route_ref(routed, given["logits"], given["bias"][0])[0]))


def _shared_expert_kind(kind: WeightKind) -> WeightKind:
    """A shared expert is kept in 8 bits where the others have 4."""
    return "int8" if kind == "int4" else kind


def _gate_up_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    w, routed = sweep.dims, _router_config(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        choice = _router_inputs(sweep, layers, rows)
        experts, shared = (layers, w.experts, w.expert_width, w.hidden), (layers, w.expert_width, w.hidden)
        return {
            "x": random_arrays.random_normal((rows, w.hidden), 1, sweep.dtype),
            "squares": unit_sum_sq(rows, w.hidden),
            "gate": sweep.random_weight(experts, kind, 2),
            "up": sweep.random_weight(experts, kind, 4),
            "shared": tuple(sweep.random_weight(shared, _shared_expert_kind(kind), seed) for seed in (6, 8)),
            "plan": _sorted_dispatch(routed, choice),
            **choice,
        }, {}

    def call(function: Any, given: Arrays, place: jax.Array, **options: Any) -> jax.Array:
        names = ("logits", "bias", "gate", "up", "shared")
        return function(routed, given["x"], given["squares"], place, *map(given.get, names), eps=EPS, **options)

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[jax.Array, Arrays]:
        made, _ = call(gate_up, given, place, plan=given["plan"], **({"shape": shape} if shape else {}))
        return made, state

    def nbytes(given: Arrays, state: Arrays) -> int:
        read = layer_nbytes(given["gate"], given["up"]) * _count_active_experts(routed, given) // w.experts
        made = array_nbytes((rows, w.experts_per_token + 1, w.expert_width), sweep.dtype)
        return read + layer_nbytes(*given["shared"]) + given["x"].nbytes + made

    return KernelSpec(
        op="gate_up",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        reference=lambda given, state, place: (call(gate_up_ref, given, place), state),
        comparable_outputs=lambda given, out, state, place: (out,),
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda given: moe_tuning_key("gate_up", routed, rows, given["gate"], given["shared"][0]),
    )


def _down_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    w, routed = sweep.dims, _router_config(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        choice = _router_inputs(sweep, layers, rows)
        return {
            "h": random_arrays.random_normal((rows * (w.experts_per_token + 1) * w.expert_width,), 1, sweep.dtype),
            "weight": sweep.random_weight((layers, w.experts, w.hidden, w.expert_width), kind, 2),
            "shared": sweep.random_weight((layers, w.hidden, w.expert_width), _shared_expert_kind(kind), 4),
            "residual": random_arrays.random_normal((rows, w.hidden), 6),
            "next_norm": random_arrays.random_normal((layers, w.hidden), 7, sweep.dtype),
            "plan": _sorted_dispatch(routed, choice) or _unsorted_dispatch(routed, choice),
            **choice,
        }, {"counters": jnp.zeros(NUM_COUNTERS, jnp.int32)}

    names = ("weight", "shared", "residual", "next_norm")

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[LinearOutput, Arrays]:
        rest, options = [*(given[name] for name in names), state["counters"]], {"shape": shape} if shape else {}
        made, counters = down(routed, given["h"], given["plan"], place, *rest, **options)
        return made, {"counters": counters}

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[LinearOutput, Arrays]:
        rest = [given[name] for name in ("logits", "bias", *names)]
        return down_ref(routed, given["h"], place, *rest), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        read = layer_nbytes(given["weight"]) * _count_active_experts(routed, given) // w.experts
        made = array_nbytes((rows, w.hidden), jnp.float32) + array_nbytes((rows, w.hidden), sweep.dtype)
        return read + layer_nbytes(given["shared"]) + given["h"].nbytes + given["residual"].nbytes + made

    return KernelSpec(
        op="down",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        reference=reference,
        comparable_outputs=comparable_linear_output,
        activation_key="h",
        bytes_accessed=nbytes,
        tuning_key=lambda given: moe_tuning_key("down", routed, rows, given["weight"], given["shared"]),
    )
