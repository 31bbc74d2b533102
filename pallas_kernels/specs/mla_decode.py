"""Attention of one new token of each row over the latent cache: queries, shares of the attention, values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays as noise
from pallas_kernels.mla_decode import Attention, Cache, Parts, attend, queries, values
from pallas_kernels.mla_decode.op import attend_problem, queries_problem, values_problem
from pallas_kernels.mla_decode.reference import attend_ref, latents_ref, queries_ref, values_ref
from pallas_kernels.quant_matmul import Squares
from pallas_kernels.specs.base import EPS, Arrays, Case, Sweep, one_layer, size_of
from pallas_kernels.tiles import Kind

_QUERY_SLOTS, _SHARES, _BLOCK = 256, 64, 32


def attend_cases(sweep: Sweep) -> Iterator[Case]:
    """Attention over full contexts, in every storage of the cache."""
    for cache in sweep.caches:
        for context in sweep.contexts:
            yield from (_attend(sweep, cache, context, rows) for rows in sweep.rows)


def queries_cases(sweep: Sweep) -> Iterator[Case]:
    """Queries and the new row of the cache, in every storage of the weights."""
    yield from (_queries(sweep, kind, rows) for kind in sweep.kinds for rows in sweep.rows)


def values_cases(sweep: Sweep) -> Iterator[Case]:
    """Shares put together and projected, in every storage of the weights; many shares for one row."""
    yield from (_values(sweep, kind, rows, max(1, _SHARES // rows)) for kind in sweep.kinds for rows in sweep.rows)


def _sizes(sweep: Sweep) -> Attention:
    w = sweep.widths
    return Attention(
        heads=w.heads, nope=w.nope, rope=w.rope, latent=w.latent, value=w.value, query_latent=w.query_latent,
        interleave=True, eps=EPS,
    )  # fmt: skip


def _attend(sweep: Sweep, kind: str, context: int, rows: int) -> Case:
    w, sizes = sweep.widths, _sizes(sweep)
    width = w.latent + w.rope

    def make(layers: int) -> tuple[Arrays, Arrays]:
        return {
            "query": noise.normal((rows, w.heads, width), 1, sweep.dtype),
            "cache": Cache(*noise.cached_rows((layers, rows, context, width), kind, 2)),
            "positions": jnp.full(rows, context - 1, jnp.int32),
        }, {}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[Any, Arrays]:
        return attend(sizes, given["query"], given["cache"], place, given["positions"], shape=shape), state

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[Any, Arrays]:
        return attend_ref(sizes, given["query"], given["cache"], place, given["positions"]), state

    def view(given: Arrays, shares: Any, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
        return (latents_ref(shares),)

    def nbytes(given: Arrays, state: Arrays) -> int:
        cache = given["cache"]
        held = cache.codes.nbytes + (0 if cache.scales is None else cache.scales.nbytes)
        return held // cache.codes.shape[0] + given["query"].nbytes

    full = f"{kind}/m{rows}/s{context}"
    # Weights of the values are rounded, and so are 8-bit rows in the dtype of the products.
    return Case(
        op="attend",
        name=full,
        make=make,
        run=run,
        reference=reference,
        view=view,
        moves="query",
        nbytes=nbytes,
        problem=lambda given: attend_problem(w.heads, given["cache"]),
        rounds=True,
    )


def _queries(sweep: Sweep, kind: Kind, rows: int) -> Case:
    w, sizes = sweep.widths, _sizes(sweep)
    width = w.query_latent + w.latent + w.rope

    def make(layers: int) -> tuple[Arrays, Arrays]:
        turns = noise.normal((rows, w.rope // 2), 3)
        # One kernel leaves both: two blocks of columns of the queries' latent, and two of the latent.
        halves = jnp.asarray([w.query_latent, w.query_latent, w.latent, w.latent], jnp.float32) / 2
        parts = jnp.broadcast_to(halves[None], (rows, 4))
        return {
            "a": noise.normal((rows, width), 1, sweep.dtype),
            "squares": (Squares(parts, 0, 2), Squares(parts, 2, 2)),
            "positions": jnp.arange(rows, dtype=jnp.int32) + 5,
            "table": jnp.stack([jnp.cos(turns), jnp.sin(turns)]).astype(sweep.dtype),
            "q_b": sweep.weight((layers, w.heads * (w.nope + w.rope), w.query_latent), kind, 2),
            "k_b": sweep.weight((layers, w.heads, w.latent, w.nope), kind, 4, turned=True),
        }, {"cache": Cache(jnp.zeros((layers, rows, _QUERY_SLOTS, w.latent + w.rope), sweep.dtype))}

    def call(function: Any, given: Arrays, state: Arrays, place: jax.Array, **options: Any) -> tuple[Any, Arrays]:
        names = ("positions", "table", "q_b", "k_b")
        arguments = (sizes, given["a"], given["squares"], place, *map(given.get, names), state["cache"])
        made, cache = function(*arguments, dtype=sweep.dtype, **options)
        return made, {"cache": cache}

    def view(given: Arrays, made: jax.Array, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
        codes = state["cache"].codes[place[0]]
        return made, codes[jnp.arange(rows, dtype=jnp.int32), given["positions"]]

    def nbytes(given: Arrays, state: Arrays) -> int:
        made = size_of((rows, w.heads + 1, w.latent + w.rope), sweep.dtype)
        return one_layer(given["q_b"], given["k_b"]) + given["a"].nbytes + made

    return Case(
        op="queries",
        name=f"{kind}/m{rows}",
        make=make,
        run=lambda given, state, place, shape: call(queries, given, state, place, shape=shape),
        reference=lambda given, state, place: call(queries_ref, given, state, place),
        view=view,
        moves="a",
        nbytes=nbytes,
        problem=lambda given: queries_problem(sizes, rows, given["q_b"], given["k_b"]),
        rounds=True,
    )


def _values(sweep: Sweep, kind: Kind, rows: int, shares: int) -> Case:
    w, sizes = sweep.widths, _sizes(sweep)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        number = (rows, shares, w.heads)
        sums, tops = noise.normal((*number, w.latent), 1), noise.normal(number, 2)
        # Rows that fill all shares, of one block each.
        positions = jnp.full(rows, shares * _BLOCK - 1, jnp.int32)
        parts = Parts(sums, tops, 1 + jnp.abs(noise.normal(number, 3)), positions, shares * _BLOCK, _BLOCK)
        return {"parts": parts, "v_b": sweep.weight((layers, w.heads, w.value, w.latent), kind, 4)}, {}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[jax.Array, Arrays]:
        return values(sizes, given["parts"], place, given["v_b"], dtype=sweep.dtype, shape=shape), state

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[jax.Array, Arrays]:
        return values_ref(sizes, given["parts"], place, given["v_b"], dtype=sweep.dtype), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        made = size_of((rows, w.heads, w.value), sweep.dtype)
        return one_layer(given["v_b"]) + sum(part.nbytes for part in jax.tree.leaves(given["parts"])) + made

    return Case(
        op="values",
        name=f"{kind}/m{rows}",
        make=make,
        run=run,
        reference=reference,
        view=lambda given, out, state, place: (out,),
        moves="parts",
        nbytes=nbytes,
        problem=lambda given: values_problem(sizes, rows, given["v_b"]),
        rounds=True,
    )
