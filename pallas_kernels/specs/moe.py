"""Experts of few tokens: the two halves of a feed-forward."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import random_arrays
from pallas_kernels._implementation import Implementation
from pallas_kernels.moe import Dispatch, RouterConfig, build_dispatch, down, gate_up
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.op import moe_tuning_key
from pallas_kernels.moe.reference import route_ref
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

# Up to here the models use unsorted pairs; more tokens are sorted by their experts.
MAX_UNSORTED_TOKENS = 8


def gate_up_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields gate, up and their product, of experts with a shared one, in every storage."""
    yield from (_gate_up_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def down_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields down and the sum over experts, in every storage."""
    yield from (_down_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def _router_config(sweep: Sweep) -> RouterConfig:
    return RouterConfig(
        experts=sweep.dims.experts,
        experts_per_token=sweep.dims.experts_per_token,
        normalize_weights=True,
        scaling_factor=1.8,
    )


def _router_inputs(sweep: Sweep, layers: int, rows: int) -> Arrays:
    """Returns the router's logits, the same for every layer, and a bias of zero."""
    logits = random_arrays.random_normal((rows, sweep.dims.experts), 11)
    return {"logits": logits, "bias": jnp.zeros((layers, sweep.dims.experts), jnp.float32)}


def _sorted_dispatch(router: RouterConfig, router_inputs: Arrays) -> Dispatch | None:
    """Returns the pairs in blocks, or ``None`` for few tokens, whose pairs a model would not sort."""
    if router_inputs["logits"].shape[0] <= MAX_UNSORTED_TOKENS:
        return None
    return build_dispatch(router, jnp.zeros(1, jnp.int32), router_inputs["logits"], router_inputs["bias"])


def _unsorted_dispatch(router: RouterConfig, router_inputs: Arrays) -> Dispatch:
    """Returns every pair as a block of its own."""
    expert_ids, weights = route_ref(router, router_inputs["logits"], router_inputs["bias"][0])
    return Dispatch(expert_ids.reshape(-1).astype(jnp.int32), weights.reshape(-1))


def _count_active_experts(router: RouterConfig, inputs: Arrays) -> int:
    """Returns how many experts some token has selected."""
    return len(np.unique(route_ref(router, inputs["logits"], inputs["bias"][0])[0]))


def _shared_expert_kind(kind: WeightKind) -> WeightKind:
    """Returns the storage of the shared expert: 8 bits where the routed ones have 4."""
    return "int8" if kind == "int4" else kind


def _gate_up_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    dims, router = sweep.dims, _router_config(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        router_inputs = _router_inputs(sweep, layers, rows)
        routed = (layers, dims.experts, dims.expert_width, dims.hidden)
        shared = (layers, dims.expert_width, dims.hidden)
        return {
            "x": random_arrays.random_normal((rows, dims.hidden), 1, sweep.dtype),
            "sum_sq": unit_sum_sq(rows, dims.hidden),
            "gate": sweep.random_weight(routed, kind, 2),
            "up": sweep.random_weight(routed, kind, 4),
            "shared": tuple(sweep.random_weight(shared, _shared_expert_kind(kind), seed) for seed in (6, 8)),
            "dispatch": _sorted_dispatch(router, router_inputs),
            **router_inputs,
        }, {}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: MoeConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, Arrays]:
        options = {"eps": EPS, "config": config, "implementation": implementation}
        hidden, _ = gate_up(router, layer_index=layer_index, **inputs, **options)
        return hidden, state

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        experts = layer_nbytes(inputs["gate"], inputs["up"]) * _count_active_experts(router, inputs) // dims.experts
        hidden = array_nbytes((rows, dims.experts_per_token + 1, dims.expert_width), sweep.dtype)
        return experts + layer_nbytes(*inputs["shared"]) + inputs["x"].nbytes + hidden

    return KernelSpec(
        op="gate_up",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        comparable_outputs=lambda inputs, out, state, layer_index: (out,),
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: moe_tuning_key("gate_up", router, rows, inputs["gate"], inputs["shared"][0]),
    )


def _down_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    dims, router = sweep.dims, _router_config(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        router_inputs = _router_inputs(sweep, layers, rows)
        hidden = (rows * (dims.experts_per_token + 1) * dims.expert_width,)
        return {
            "h": random_arrays.random_normal(hidden, 1, sweep.dtype),
            "weight": sweep.random_weight((layers, dims.experts, dims.hidden, dims.expert_width), kind, 2),
            "shared": sweep.random_weight((layers, dims.hidden, dims.expert_width), _shared_expert_kind(kind), 4),
            "residual": random_arrays.random_normal((rows, dims.hidden), 6),
            "next_norm": random_arrays.random_normal((layers, dims.hidden), 7, sweep.dtype),
            "dispatch": _sorted_dispatch(router, router_inputs) or _unsorted_dispatch(router, router_inputs),
            **router_inputs,
        }, {"counters": jnp.zeros(NUM_COUNTERS, jnp.int32)}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: MoeConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[LinearOutput, Arrays]:
        result, counters = down(
            router,
            inputs["h"],
            inputs["dispatch"],
            layer_index,
            inputs["weight"],
            inputs["shared"],
            inputs["residual"],
            inputs["next_norm"],
            state["counters"],
            config=config,
            implementation=implementation,
        )
        return result, {"counters": counters}

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        experts = layer_nbytes(inputs["weight"]) * _count_active_experts(router, inputs) // dims.experts
        out = array_nbytes((rows, dims.hidden), jnp.float32) + array_nbytes((rows, dims.hidden), sweep.dtype)
        return experts + layer_nbytes(inputs["shared"]) + inputs["h"].nbytes + inputs["residual"].nbytes + out

    return KernelSpec(
        op="down",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        comparable_outputs=comparable_linear_output,
        activation_key="h",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: moe_tuning_key("down", router, rows, inputs["weight"], inputs["shared"]),
    )
