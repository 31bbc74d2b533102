"""Products and attention of prompts: many rows at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels._implementation import Implementation
from pallas_kernels.grouped_matmul import RowBlocks, choose_block_m, gated_linear_unit, grouped_matmul
from pallas_kernels.grouped_matmul.config import GroupedMatmulConfig
from pallas_kernels.grouped_matmul.op import grouped_matmul_tuning_key
from pallas_kernels.mla_prefill import flash_attention
from pallas_kernels.mla_prefill.config import FlashAttentionConfig
from pallas_kernels.mla_prefill.op import flash_attention_tuning_key
from pallas_kernels.specs.base import Arrays, KernelSpec, Sweep, array_nbytes, layer_nbytes
from pallas_kernels.tiles import WeightKind


def grouped_matmul_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields the output projection of a chunk of a prompt, in every storage of the weights."""
    yield from (
        _grouped_matmul_spec(sweep, kind, tokens) for kind in sweep.weight_kinds for tokens in sweep.prefill_lengths
    )


def gated_linear_unit_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields gate, up and their product for a chunk whose tokens are spread evenly over the experts."""
    yield from (
        _gated_linear_unit_spec(sweep, kind, tokens) for kind in sweep.weight_kinds for tokens in sweep.prefill_lengths
    )


def flash_attention_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields causal attention of a chunk over itself. Arithmetic bounds it, so all calls read the same arrays."""
    yield from (_flash_attention_spec(sweep, tokens) for tokens in sweep.prefill_lengths)


def _grouped_matmul_spec(sweep: Sweep, kind: WeightKind, tokens: int) -> KernelSpec:
    dims = sweep.dims
    width = dims.heads * dims.value

    def make(layers: int) -> tuple[Arrays, Arrays]:
        weight = sweep.random_weight((layers, dims.hidden, width), kind, 2)
        return {"x": random_arrays.random_normal((tokens, width), 1, sweep.dtype), "weight": weight}, {}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: GroupedMatmulConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, Arrays]:
        out = grouped_matmul(
            inputs["x"], inputs["weight"], layer_index, dtype=jnp.float32, config=config, implementation=implementation
        )
        return out, state

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        return layer_nbytes(inputs["weight"]) + inputs["x"].nbytes + array_nbytes((tokens, dims.hidden), jnp.float32)

    return KernelSpec(
        op="matmul",
        name=f"{kind}/t{tokens}",
        make_inputs=make,
        run=run,
        comparable_outputs=lambda inputs, out, state, layer_index: (out,),
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: grouped_matmul_tuning_key("matmul", choose_block_m(tokens, 1), inputs["weight"]),
        rounds_intermediates=True,
    )


def _gated_linear_unit_spec(sweep: Sweep, kind: WeightKind, tokens: int) -> KernelSpec:
    dims = sweep.dims
    pairs = tokens * dims.experts_per_token

    def make(layers: int) -> tuple[Arrays, Arrays]:
        shape = (layers, dims.experts, dims.expert_width, dims.hidden)
        return {
            "x": random_arrays.random_normal((tokens, dims.hidden), 1, sweep.dtype),
            "gate": sweep.random_weight(shape, kind, 2),
            "up": sweep.random_weight(shape, kind, 4),
            "blocks": _round_robin_blocks(pairs, dims.experts),
        }, {}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: GroupedMatmulConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, Arrays]:
        options = {"outputs_per_row": dims.experts_per_token, "config": config, "implementation": implementation}
        return gated_linear_unit(layer_index=layer_index, **inputs, **options), state

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        hidden = array_nbytes((pairs, dims.expert_width), sweep.dtype)
        return layer_nbytes(inputs["gate"], inputs["up"]) + inputs["x"].nbytes + hidden

    return KernelSpec(
        op="gated",
        name=f"{kind}/t{tokens}",
        make_inputs=make,
        run=run,
        comparable_outputs=lambda inputs, out, state, layer_index: (out,),
        activation_key="x",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: grouped_matmul_tuning_key(
            "gated", choose_block_m(pairs, dims.experts), inputs["gate"]
        ),
        rounds_intermediates=True,
    )


def _round_robin_blocks(pairs: int, experts: int) -> RowBlocks:
    """Assigns pair i to expert ``i % experts``."""
    height = choose_block_m(pairs, experts)
    pairs_per_expert = math.ceil(pairs / experts)
    blocks_per_expert = math.ceil(pairs_per_expert / height)
    order = jnp.arange(blocks_per_expert * height, dtype=jnp.int32)
    expert_ids = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), blocks_per_expert)
    rows = jnp.arange(experts, dtype=jnp.int32)[:, None] + experts * order[None]
    rows = jnp.where(rows < pairs, rows, -1).reshape(-1, height)
    return RowBlocks(jnp.where(rows[:, 0] < 0, -1, expert_ids), rows)


def _flash_attention_spec(sweep: Sweep, tokens: int) -> KernelSpec:
    dims = sweep.dims

    def make(layers: int) -> tuple[Arrays, Arrays]:
        head = (1, tokens, dims.heads)
        return {
            "q": random_arrays.random_normal((*head, dims.nope + dims.rope), 1, sweep.dtype),
            "k_nope": random_arrays.random_normal((*head, dims.nope), 2, sweep.dtype),
            "k_rope": random_arrays.random_normal((1, tokens, dims.rope), 3, sweep.dtype),
            "v": random_arrays.random_normal((*head, dims.value), 4, sweep.dtype),
            "positions": jnp.arange(tokens, dtype=jnp.int32)[None],
        }, {}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: FlashAttentionConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], Arrays]:
        # Always zero, but XLA does not know it: identical calls would become one. It costs a kernel of one number,
        # which is little beside the attention of hundreds of tokens.
        first_key, scale = jnp.minimum(layer_index, 0), (dims.nope + dims.rope) ** -0.5
        options = {"config": config, "implementation": implementation}
        return flash_attention(first_key=first_key, scale=scale, **inputs, **options), state

    def nbytes(inputs: Arrays, state: Arrays) -> int:
        arrays = sum(inputs[name].nbytes for name in ("q", "k_nope", "k_rope", "v"))
        return arrays + array_nbytes((tokens, dims.heads, dims.value), sweep.dtype)

    return KernelSpec(
        op="flash",
        name=f"t{tokens}",
        make_inputs=make,
        run=run,
        comparable_outputs=lambda inputs, out, state, layer_index: out,
        activation_key="q",
        bytes_accessed=nbytes,
        tuning_key=lambda inputs: flash_attention_tuning_key(
            tokens, dims.heads, (dims.nope + dims.rope, dims.value), jnp.dtype(sweep.dtype).itemsize
        ),
        rounds_intermediates=True,
    )
