"""Products and attention of prompts: many rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels.grouped_matmul import RowBlocks, choose_block_m, gated_linear_unit, grouped_matmul
from pallas_kernels.grouped_matmul.op import grouped_matmul_tuning_key
from pallas_kernels.grouped_matmul.reference import gated_linear_unit_ref, grouped_matmul_ref
from pallas_kernels.mla_prefill import flash_attention
from pallas_kernels.mla_prefill.op import flash_attention_tuning_key
from pallas_kernels.mla_prefill.reference import flash_attention_ref
from pallas_kernels.specs.base import Arrays, KernelSpec, Sweep, array_nbytes, layer_nbytes
from pallas_kernels.tiles import WeightKind


def grouped_matmul_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """The output projection of a chunk of a prompt, in every storage of the weights."""
    yield from (
        _grouped_matmul_spec(sweep, kind, tokens) for kind in sweep.weight_kinds for tokens in sweep.prefill_lengths
    )


def gated_linear_unit_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Gate, up and their product for a chunk, tokens shared out evenly among the experts."""
    yield from (
        _gated_linear_unit_spec(sweep, kind, tokens) for kind in sweep.weight_kinds for tokens in sweep.prefill_lengths
    )


def flash_attention_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Causal attention of a chunk over itself; bound by arithmetic, so all calls read the same."""
    yield from (_flash_attention_spec(sweep, tokens) for tokens in sweep.prefill_lengths)


def _grouped_matmul_spec(sweep: Sweep, kind: WeightKind, tokens: int) -> KernelSpec:
    w = sweep.dims
    inputs = w.heads * w.value

    def make(layers: int) -> tuple[Arrays, Arrays]:
        weight = sweep.random_weight((layers, w.hidden, inputs), kind, 2)
        return {"x": random_arrays.random_normal((tokens, inputs), 1, sweep.dtype), "weight": weight}, {}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[jax.Array, Arrays]:
        return grouped_matmul(given["x"], given["weight"], place, dtype=jnp.float32, config=shape), state

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[jax.Array, Arrays]:
        return grouped_matmul_ref(given["x"], given["weight"], place, dtype=jnp.float32), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        return layer_nbytes(given["weight"]) + given["x"].nbytes + array_nbytes((tokens, w.hidden), jnp.float32)

    return KernelSpec(
        op="matmul",
        name=f"{kind}/t{tokens}",
        make_inputs=make,
        run=run,
        reference=reference,
        comparable_outputs=lambda given, out, state, place: (out,),
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda given: grouped_matmul_tuning_key("matmul", choose_block_m(tokens, 1), given["weight"]),
        rounds_intermediates=True,
    )


def _gated_linear_unit_spec(sweep: Sweep, kind: WeightKind, tokens: int) -> KernelSpec:
    w = sweep.dims
    pairs = tokens * w.experts_per_token

    def make(layers: int) -> tuple[Arrays, Arrays]:
        shape = (layers, w.experts, w.expert_width, w.hidden)
        return {
            "x": random_arrays.random_normal((tokens, w.hidden), 1, sweep.dtype),
            "gate": sweep.random_weight(shape, kind, 2),
            "up": sweep.random_weight(shape, kind, 4),
            "blocks": _round_robin_blocks(pairs, w.experts),
        }, {}

    def call(function: Any, given: Arrays, place: jax.Array, **options: Any) -> jax.Array:
        rows = (given["gate"], given["up"], place)
        return function(given["x"], *rows, blocks=given["blocks"], chosen=w.experts_per_token, **options)

    def nbytes(given: Arrays, state: Arrays) -> int:
        return (
            layer_nbytes(given["gate"], given["up"])
            + given["x"].nbytes
            + array_nbytes((pairs, w.expert_width), sweep.dtype)
        )

    return KernelSpec(
        op="gated",
        name=f"{kind}/t{tokens}",
        make_inputs=make,
        run=lambda given, state, place, shape: (call(gated_linear_unit, given, place, shape=shape), state),
        reference=lambda given, state, place: (call(gated_linear_unit_ref, given, place), state),
        comparable_outputs=lambda given, out, state, place: (out,),
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda given: grouped_matmul_tuning_key("gated", choose_block_m(pairs, w.experts), given["gate"]),
        rounds_intermediates=True,
    )


def _round_robin_blocks(pairs: int, experts: int) -> RowBlocks:
    """Pair i is of expert i modulo their number."""
    size = choose_block_m(pairs, experts)
    each = -(-pairs // experts)
    per_expert = -(-each // size)
    order = jnp.arange(per_expert * size, dtype=jnp.int32)
    owners = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), per_expert)
    rows = jnp.arange(experts, dtype=jnp.int32)[:, None] + experts * order[None]
    rows = jnp.where(rows < pairs, rows, -1).reshape(-1, size)
    return RowBlocks(jnp.where(rows[:, 0] < 0, -1, owners), rows)


def _flash_attention_spec(sweep: Sweep, tokens: int) -> KernelSpec:
    w = sweep.dims

    def make(layers: int) -> tuple[Arrays, Arrays]:
        head = (1, tokens, w.heads)
        return {
            "q": random_arrays.random_normal((*head, w.nope + w.rope), 1, sweep.dtype),
            "keys": random_arrays.random_normal((*head, w.nope), 2, sweep.dtype),
            "rope": random_arrays.random_normal((1, tokens, w.rope), 3, sweep.dtype),
            "v": random_arrays.random_normal((*head, w.value), 4, sweep.dtype),
            "positions": jnp.arange(tokens, dtype=jnp.int32)[None],
        }, {}

    def call(function: Any, given: Arrays, place: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        # Zero, and known to nobody who compiles: calls with nothing of their own would be one. It takes a kernel of one
        # number, which is little beside the attention of hundreds of tokens.
        first, scale = jnp.minimum(place, 0), (w.nope + w.rope) ** -0.5
        arrays = (given[name] for name in ("q", "keys", "rope", "v", "positions"))
        return function(*arrays, first, scale=scale, **options)

    def nbytes(given: Arrays, state: Arrays) -> int:
        made = array_nbytes((tokens, w.heads, w.value), sweep.dtype)
        return given["keys"].nbytes + given["v"].nbytes + given["q"].nbytes + given["rope"].nbytes + made

    return KernelSpec(
        op="flash",
        name=f"t{tokens}",
        make_inputs=make,
        run=lambda given, state, place, shape: (call(flash_attention, given, place, shape=shape), state),
        reference=lambda given, state, place: (call(flash_attention_ref, given, place), state),
        comparable_outputs=lambda given, out, state, place: out,
        activation_key="q",
        bytes_accessed=nbytes,
        tuning_key=lambda given: flash_attention_tuning_key(
            tokens, w.heads, (w.nope + w.rope, w.value), jnp.dtype(sweep.dtype).itemsize
        ),
        rounds_intermediates=True,
    )
