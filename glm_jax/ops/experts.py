"""The experts of a mixture of experts: five ways to apply the chosen ones, with the same result."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from glm_jax.ops.expert_dispatch import dispatch_to_blocks, rank_in_expert
from glm_jax.ops.linear import Index, einsum_f32, index_weight, linear
from glm_jax.ops.mlp import swiglu
from glm_jax.ops.router import Routing, routing_to_dense
from glm_jax.sharding import Rules, vary_like
from glm_jax.weights import Weight, Weights, as_weight_matrix
from pallas_kernels import grouped_matmul

_MAX_FEW_PAIRS = 64
_FLOAT32 = jnp.dtype(jnp.float32)
ExpertMethod = Literal["auto", "pairs", "blocks", "batched", "dense", "kernels"]


@jax.named_scope("experts")
def apply_experts(
    x: jax.Array, routing: Routing, w: Weights, layer: Index, rules: Rules = Rules(), method: ExpertMethod = "auto"
) -> jax.Array:
    """``sum_k weight_k * expert_k(x)`` over the chosen experts, summed over the devices that share the work.

    Args:
        x: ``[n, D]``.
        routing: Experts of each token and their weights.
        w: This device's part of ``gate`` and ``up [l, E, F, D]`` and ``down [l, E, D, F]``, stacked by layer.
        layer: Index into the stacks.
        rules: Mesh axis of each logical axis.
        method: How to apply the experts. "auto" takes the cheapest method.

            * "pairs" scans over (token, expert) pairs and reads each pair's expert.
            * "blocks" sorts the pairs by expert and reads an expert once per block of pairs.
            * "batched" applies all experts at once to an equal number of tokens, and the remaining pairs in blocks.
            * "dense" applies all experts to all tokens.
            * "kernels" sorts the pairs into blocks for kernels, which need all matrices in tiles.

    Returns:
        ``float32 [n, D]``.
    """
    num_local = w["gate"].shape[1]
    routing = _local_routing(routing, rules.index("experts") * num_local, num_local)
    if method == "auto" and _can_use_kernels(w):
        method = "kernels"
    if method == "auto":
        method = select_expert_method(
            x.shape[0], routing.expert_ids.shape[1], num_local, in_place=_is_whole_array(w["gate"], layer)
        )
    methods = {
        "pairs": _apply_pairs,
        "blocks": _apply_blocks,
        "batched": _apply_batched,
        "dense": _apply_dense,
        "kernels": _apply_kernels,
    }
    out = methods[method](x, routing, w, layer)
    return rules.psum(out, "experts", "ffn")


def _can_use_kernels(w: Weights) -> bool:
    gate, up, down = (as_weight_matrix(w[name]) for name in ("gate", "up", "down"))
    return gate.can_fuse_gate_up(up) and down.is_tiled


@jax.named_scope("shared_experts")
def apply_shared_experts(x: jax.Array, w: Weights, layer: Index, rules: Rules = Rules()) -> jax.Array:
    """The experts that every token uses, as one: ``[n, D]`` to ``float32 [n, D]``."""
    out = swiglu(x, w["shared_gate"], w["shared_up"], w["shared_down"], layer, dtype=_FLOAT32)
    return rules.psum(out, "ffn")


def select_expert_method(tokens: int, top_k: int, num_experts: int, in_place: bool = False) -> ExpertMethod:
    """The method that reads and computes least for these sizes.

    Args:
        tokens: Number of tokens.
        top_k: Experts per token.
        num_experts: Experts on this device.
        in_place: Whether all experts of the layer can be multiplied without a copy.
    """
    if num_experts <= 2 * top_k and tokens > 8:
        return "dense"
    if tokens * top_k < 2 * num_experts:
        return "pairs"
    return "batched" if in_place else "blocks"


def _is_whole_array(stack: Weight, layer: Index) -> bool:
    """Whether a layer's experts are the whole array: XLA:CPU copies a slice that goes into a product of many rows."""
    return isinstance(layer, int) and stack.shape[0] == 1 and as_weight_matrix(stack).is_plain


def _local_routing(routing: Routing, first: Index, count: int) -> Routing:
    """Numbers this device's experts from 0; all others get the id ``count`` and weight 0."""
    local = routing.expert_ids - first
    is_local = (local >= 0) & (local < count)
    return Routing(jnp.where(is_local, local, count), jnp.where(is_local, routing.weights, 0.0))


def _apply_pairs(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    token_of = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), chosen)

    def step(_: None, pair: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        token, expert = pair
        row = jax.lax.dynamic_slice_in_dim(x, token, 1)
        return None, swiglu(row, w["gate"], w["up"], w["down"], layer, expert, dtype=_FLOAT32)[0]

    _, outs = jax.lax.scan(step, None, (token_of, routing.expert_ids.reshape(-1)))
    return _weighted_sum(outs.reshape(tokens, chosen, -1), routing.weights)


def _apply_dense(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    gate, up, down = (index_weight(w[name], layer) for name in ("gate", "up", "down"))
    experts, width, _ = gate.shape
    flat = experts * width
    hidden = jax.nn.silu(linear(x, gate.reshape(flat, -1))) * linear(x, up.reshape(flat, -1))
    weights = routing_to_dense(routing, experts)
    weighted = hidden.reshape(-1, experts, width).astype(jnp.float32) * weights[..., None]
    columns = jnp.moveaxis(down, 0, 1).reshape(-1, flat)
    return linear(weighted.astype(x.dtype).reshape(-1, flat), columns, dtype=_FLOAT32)


def _apply_batched(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    gate, up, down = (index_weight(w[name], layer) for name in ("gate", "up", "down"))
    experts, expert_of_pair = gate.shape[0], routing.expert_ids.reshape(-1)
    pairs = expert_of_pair.shape[0]
    # A quarter over the mean: most experts' tokens fit when the load is balanced.
    height = 8 * -(-5 * pairs // (4 * 8 * experts))
    rank = rank_in_expert(expert_of_pair, experts)
    table = jnp.full((experts, height), -1, jnp.int32)
    table = table.at[expert_of_pair, rank].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    rows = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])[jnp.where(table < 0, tokens, table // chosen)]
    product = functools.partial(einsum_f32, "eoi,eni->eon")
    hidden = jnp.swapaxes(jax.nn.silu(product(gate, rows)) * product(up, rows), 1, 2).astype(x.dtype)
    # The barrier keeps XLA from folding the transposition into the product, which then has only a slow form.
    outs = jnp.swapaxes(jax.lax.optimization_barrier(product(down, hidden)), 1, 2)
    fits = (rank < height) & (expert_of_pair < experts)
    by_pair = outs[jnp.where(fits, expert_of_pair, 0), jnp.where(fits, rank, 0)].reshape(tokens, chosen, -1)
    fits = fits.reshape(tokens, chosen)
    out = _weighted_sum(by_pair, jnp.where(fits, routing.weights, 0.0))
    rest = Routing(jnp.where(fits, experts, routing.expert_ids), jnp.where(fits, 0.0, routing.weights))
    num_rest = jnp.sum(rest.expert_ids < experts)
    branches = [
        lambda out: out,
        lambda out: out + _apply_few_pairs(x, rest, w, layer),
        lambda out: out + _apply_blocks(x, rest, w, layer),
    ]
    branch = (num_rest > 0).astype(jnp.int32) + (num_rest > _MAX_FEW_PAIRS).astype(jnp.int32)
    return jax.lax.switch(branch, branches, out)


def _apply_few_pairs(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    """:func:`_apply_pairs` for at most :data:`_MAX_FEW_PAIRS` pairs with an expert on this device."""
    tokens, chosen = routing.expert_ids.shape
    expert_of_pair = routing.expert_ids.reshape(-1)
    is_local = expert_of_pair < w["gate"].shape[1]
    first = jnp.argsort(~is_local, stable=True)[:_MAX_FEW_PAIRS].astype(jnp.int32)
    weights = routing.weights.reshape(-1)

    def apply(out: jax.Array, pair: jax.Array) -> jax.Array:
        token, expert = pair // chosen, expert_of_pair[pair]
        row = jax.lax.dynamic_slice_in_dim(x, token, 1)
        expert_out = swiglu(row, w["gate"], w["up"], w["down"], layer, expert, dtype=_FLOAT32)
        return out.at[token].add(weights[pair] * expert_out[0])

    def step(out: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(is_local[pair], apply, lambda out, _: out, out, pair), None

    start = vary_like(jnp.zeros((tokens, x.shape[1]), jnp.float32), jax.tree.leaves(w["gate"])[0])
    return jax.lax.scan(step, start, first)[0]


def _apply_blocks(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    dispatch = dispatch_to_blocks(routing.expert_ids.reshape(-1), w["gate"].shape[1])
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])

    def apply(rows: jax.Array, expert: jax.Array) -> jax.Array:
        return swiglu(rows, w["gate"], w["up"], w["down"], layer, expert, dtype=_FLOAT32)

    def step(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        expert, pairs = block
        rows = padded[jnp.where(pairs < 0, tokens, pairs // chosen)]
        skip = vary_like(jnp.zeros(rows.shape, jnp.float32), jax.tree.leaves(w["gate"])[0])
        return None, jax.lax.cond(expert >= 0, apply, lambda *_: skip, rows, jnp.maximum(expert, 0))

    _, outs = jax.lax.scan(step, None, (dispatch.expert_ids, dispatch.pair_ids))
    by_pair = outs.reshape(-1, x.shape[1])[dispatch.pair_slots]
    return _weighted_sum(by_pair.reshape(tokens, chosen, -1), routing.weights)


def _apply_kernels(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    gate, up, down = (as_weight_matrix(w[name]).kernel_tiles for name in ("gate", "up", "down"))
    assert gate is not None  # _can_use_kernels
    assert up is not None
    assert down is not None
    expert_of_pair, experts = routing.expert_ids.reshape(-1), gate.stack[1]
    block_m = grouped_matmul.choose_block_m(tokens * chosen, experts)
    dispatch = dispatch_to_blocks(expert_of_pair, experts, block_m)
    layer_index = jnp.asarray(layer, jnp.int32).reshape(1)
    blocks = grouped_matmul.RowBlocks(dispatch.expert_ids, dispatch.pair_ids)
    hidden = grouped_matmul.gated_linear_unit(x, gate, up, layer_index, blocks=blocks, outputs_per_row=chosen)
    weights = routing.weights.reshape(-1)
    outs = grouped_matmul.grouped_matmul(
        hidden, down, layer_index, blocks=blocks, row_scales=weights, dtype=jnp.float32
    )
    # Pairs whose expert is on another device are in no block, and the kernel left their rows unwritten.
    outs = jnp.where((expert_of_pair < experts)[:, None], outs, 0.0)
    return jnp.sum(outs.reshape(tokens, chosen, -1), axis=1)


def _weighted_sum(outs: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("nxd,nx->nd", outs, weights, precision=jax.lax.Precision.HIGHEST)
