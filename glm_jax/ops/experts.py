"""Mixture of experts: the router, and five ways to apply the chosen experts with the same result.

Routing is that of DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 2.1.2): sigmoid scores, a bias that takes part
in the choice only, the chosen scores normalized to sum to ``routed_scaling_factor``.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from glm_jax.ops import tiled_matmul
from glm_jax.ops.expert_dispatch import dispatch_to_blocks, rank_in_expert
from glm_jax.ops.linear import Index, einsum_f32, index_weight, linear
from glm_jax.ops.mlp import swiglu
from glm_jax.ops.router import Routing, routing_to_dense
from glm_jax.sharding import Rules, vary_like
from glm_jax.weights import TiledWeight, Weight
from pallas_kernels import grouped_matmul

Weights = dict[str, Weight]
_MAX_FEW_PAIRS = 64
ExpertMethod = Literal["auto", "pairs", "blocks", "batched", "dense", "kernels"]


def apply_experts(
    x: jax.Array, routing: Routing, w: Weights, layer: Index, rules: Rules = Rules(), method: ExpertMethod = "auto"
) -> jax.Array:
    """``sum_k weight_k * expert_k(x)`` over the chosen experts, summed over the devices that share the work.

    Args:
        x: ``[n, D]``.
        w: ``gate, up [.., E, F, D]`` and ``down [.., E, D, F]``, stacked by layer; the local part of them.
        method: "pairs" scans over (token, expert) pairs and reads each pair's expert; "blocks" sorts the pairs and
            reads an expert once per block of rows; "batched" applies all experts at once to an equal number of rows
            and the rest in blocks; "dense" applies all experts to all tokens; "kernels" sorts the pairs into blocks
            for kernels, which need all matrices in tiles. "auto" takes the cheapest.

    Returns:
        ``[n, D]`` in float32.
    """
    local = w["gate"].shape[1]
    routing = _local_routing(routing, rules.axis_index("experts") * local, local)
    if method == "auto" and tiled_matmul.can_fuse_gate_up(w["gate"], w["up"]) and isinstance(w["down"], TiledWeight):
        method = "kernels"
    if method == "auto":
        method = select_expert_method(
            x.shape[0], routing.expert_ids.shape[1], local, in_place=_is_whole_array(w["gate"], layer)
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


def apply_shared_experts(x: jax.Array, w: Weights, layer: Index, rules: Rules = Rules()) -> jax.Array:
    """The always-on expert: ``[n, D]`` to ``[n, D]`` in float32."""
    out = swiglu(x, w["shared_gate"], w["shared_up"], w["shared_down"], layer, dtype=jnp.dtype(jnp.float32))
    return rules.psum(out, "ffn")


def select_expert_method(tokens: int, top_k: int, num_experts: int, in_place: bool = False) -> ExpertMethod:
    """The method that reads and computes least for these numbers.

    Args:
        tokens: rows.
        top_k: experts per token.
        num_experts: number of them here.
        in_place: whether all experts of the layer can be multiplied without copying them first.
    """
    if num_experts <= 2 * top_k and tokens > 8:
        return "dense"
    if tokens * top_k < 2 * num_experts:
        return "pairs"
    return "batched" if in_place else "blocks"


def _is_whole_array(stack: Weight, layer: Index) -> bool:
    """Whether a layer's experts are the whole array: XLA:CPU copies a slice that goes into a product of many rows."""
    return isinstance(layer, int) and stack.shape[0] == 1 and isinstance(stack, jax.Array)


def _local_routing(routing: Routing, first: Index, count: int) -> Routing:
    """Numbers the experts that are here from 0; the others get a number past the end and no weight."""
    local = routing.expert_ids - first
    here = (local >= 0) & (local < count)
    return Routing(jnp.where(here, local, count), jnp.where(here, routing.weights, 0.0))


def _apply_pairs(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    token_of = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), chosen)

    def one(_, pair):  # noqa: ANN001, ANN202
        token, expert = pair
        row = jax.lax.dynamic_slice_in_dim(x, token, 1)
        return None, swiglu(row, w["gate"], w["up"], w["down"], layer, expert, dtype=jnp.dtype(jnp.float32))[0]

    _, outs = jax.lax.scan(one, None, (token_of, routing.expert_ids.reshape(-1)))
    return _weighted_sum(outs.reshape(tokens, chosen, -1), routing.weights)


def _apply_dense(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    gate, up, down = (index_weight(w[name], layer) for name in ("gate", "up", "down"))
    experts, width, _ = gate.shape
    flat = experts * width
    hidden = jax.nn.silu(linear(x, gate.reshape(flat, -1))) * linear(x, up.reshape(flat, -1))
    weights = routing_to_dense(routing, experts)
    weighted = hidden.reshape(-1, experts, width).astype(jnp.float32) * weights[..., None]
    columns = jnp.moveaxis(down, 0, 1).reshape(-1, flat)
    return linear(weighted.astype(x.dtype).reshape(-1, flat), columns, dtype=jnp.dtype(jnp.float32))


def _apply_batched(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    gate, up, down = (index_weight(w[name], layer) for name in ("gate", "up", "down"))
    experts, expert_of_pair = gate.shape[0], routing.expert_ids.reshape(-1)
    pairs = expert_of_pair.shape[0]
    # A quarter over the mean: most experts' rows fit when the load is balanced.
    height = 8 * -(-5 * pairs // (4 * 8 * experts))
    rank = rank_in_expert(expert_of_pair, experts)
    table = jnp.full((experts, height), -1, jnp.int32)
    table = table.at[expert_of_pair, rank].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    rows = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])[jnp.where(table < 0, tokens, table // chosen)]
    product = functools.partial(einsum_f32, "eoi,eni->eon")
    hidden = jnp.swapaxes(jax.nn.silu(product(gate, rows)) * product(up, rows), 1, 2).astype(x.dtype)
    # The barrier keeps XLA from folding the transposition into a product that it has only a slow form of.
    outs = jnp.swapaxes(jax.lax.optimization_barrier(product(down, hidden)), 1, 2)
    fits = (rank < height) & (expert_of_pair < experts)
    by_pair = outs[jnp.where(fits, expert_of_pair, 0), jnp.where(fits, rank, 0)].reshape(tokens, chosen, -1)
    fits = fits.reshape(tokens, chosen)
    out = _weighted_sum(by_pair, jnp.where(fits, routing.weights, 0.0))
    rest = Routing(jnp.where(fits, experts, routing.expert_ids), jnp.where(fits, 0.0, routing.weights))
    left = jnp.sum(rest.expert_ids < experts)
    branches = [
        lambda out: out,
        lambda out: out + _apply_few_pairs(x, rest, w, layer),
        lambda out: out + _apply_blocks(x, rest, w, layer),
    ]
    which = (left > 0).astype(jnp.int32) + (left > _MAX_FEW_PAIRS).astype(jnp.int32)
    return jax.lax.switch(which, branches, out)


def _apply_few_pairs(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    """As ``_pairs``, but of the :data:`_MAX_FEW_PAIRS` that there are at most, and only those."""
    tokens, chosen = routing.expert_ids.shape
    expert_of_pair = routing.expert_ids.reshape(-1)
    here = expert_of_pair < w["gate"].shape[1]
    first = jnp.argsort(~here, stable=True)[:_MAX_FEW_PAIRS].astype(jnp.int32)
    weights = routing.weights.reshape(-1)

    def apply(out, pair):  # noqa: ANN001, ANN202
        token, expert = pair // chosen, expert_of_pair[pair]
        row = jax.lax.dynamic_slice_in_dim(x, token, 1)
        made = swiglu(row, w["gate"], w["up"], w["down"], layer, expert, dtype=jnp.dtype(jnp.float32))
        return out.at[token].add(weights[pair] * made[0])

    def one(out, pair):  # noqa: ANN001, ANN202
        return jax.lax.cond(here[pair], apply, lambda out, _: out, out, pair), None

    start = vary_like(jnp.zeros((tokens, x.shape[1]), jnp.float32), jax.tree.leaves(w["gate"])[0])
    return jax.lax.scan(one, start, first)[0]


def _apply_blocks(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    plan = dispatch_to_blocks(routing.expert_ids.reshape(-1), w["gate"].shape[1])
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])

    def apply(rows, expert):  # noqa: ANN001, ANN202
        return swiglu(rows, w["gate"], w["up"], w["down"], layer, expert, dtype=jnp.dtype(jnp.float32))

    def one(_, block):  # noqa: ANN001, ANN202
        expert, pairs = block
        rows = padded[jnp.where(pairs < 0, tokens, pairs // chosen)]
        skip = vary_like(jnp.zeros(rows.shape, jnp.float32), jax.tree.leaves(w["gate"])[0])
        return None, jax.lax.cond(expert >= 0, apply, lambda *_: skip, rows, jnp.maximum(expert, 0))

    _, outs = jax.lax.scan(one, None, (plan.expert_ids, plan.pair_ids))
    by_pair = outs.reshape(-1, x.shape[1])[plan.pair_slots]
    return _weighted_sum(by_pair.reshape(tokens, chosen, -1), routing.weights)


def _apply_kernels(x: jax.Array, routing: Routing, w: Weights, layer: Index) -> jax.Array:
    tokens, chosen = routing.expert_ids.shape
    gate, up, down = (w[name].tiles for name in ("gate", "up", "down"))  # pyright: ignore[reportAttributeAccessIssue]
    expert_of_pair, experts = routing.expert_ids.reshape(-1), gate.stack[1]
    plan = dispatch_to_blocks(expert_of_pair, experts, grouped_matmul.choose_block_m(tokens * chosen, experts))
    place, blocks = jnp.asarray(layer, jnp.int32).reshape(1), grouped_matmul.RowBlocks(plan.expert_ids, plan.pair_ids)
    hidden = grouped_matmul.gated_linear_unit(x, gate, up, place, blocks=blocks, outputs_per_row=chosen)
    weights = routing.weights.reshape(-1)
    outs = grouped_matmul.grouped_matmul(hidden, down, place, blocks=blocks, row_scales=weights, dtype=jnp.float32)
    # Pairs of experts that are elsewhere are in no block, and nothing was written for them.
    outs = jnp.where((expert_of_pair < experts)[:, None], outs, 0.0)
    return jnp.sum(outs.reshape(tokens, chosen, -1), axis=1)


def _weighted_sum(outs: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("nxd,nx->nd", outs, weights, precision=jax.lax.Precision.HIGHEST)
