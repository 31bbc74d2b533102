"""Products and attention of prompts: many rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays as noise
from pallas_kernels.grouped_matmul import Blocks, gated, height, matmul
from pallas_kernels.grouped_matmul.op import problem
from pallas_kernels.grouped_matmul.reference import gated_ref, matmul_ref
from pallas_kernels.mla_prefill import flash
from pallas_kernels.mla_prefill.op import problem as flash_problem
from pallas_kernels.mla_prefill.reference import flash_ref
from pallas_kernels.specs.base import Arrays, Case, Sweep, one_layer, size_of
from pallas_kernels.tiles import Kind


def matmul_cases(sweep: Sweep) -> Iterator[Case]:
    """The output projection of a chunk of a prompt, in every storage of the weights."""
    yield from (_matmul(sweep, kind, tokens) for kind in sweep.kinds for tokens in sweep.chunks)


def gated_cases(sweep: Sweep) -> Iterator[Case]:
    """Gate, up and their product for a chunk, tokens shared out evenly among the experts."""
    yield from (_gated(sweep, kind, tokens) for kind in sweep.kinds for tokens in sweep.chunks)


def flash_cases(sweep: Sweep) -> Iterator[Case]:
    """Causal attention of a chunk over itself; bound by arithmetic, so all calls read the same."""
    yield from (_flash(sweep, tokens) for tokens in sweep.chunks)


def _matmul(sweep: Sweep, kind: Kind, tokens: int) -> Case:
    w = sweep.widths
    inputs = w.heads * w.value

    def make(layers: int) -> tuple[Arrays, Arrays]:
        weight = sweep.weight((layers, w.hidden, inputs), kind, 2)
        return {"x": noise.normal((tokens, inputs), 1, sweep.dtype), "weight": weight}, {}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[jax.Array, Arrays]:
        return matmul(given["x"], given["weight"], place, dtype=jnp.float32, shape=shape), state

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[jax.Array, Arrays]:
        return matmul_ref(given["x"], given["weight"], place, dtype=jnp.float32), state

    def nbytes(given: Arrays, state: Arrays) -> int:
        return one_layer(given["weight"]) + given["x"].nbytes + size_of((tokens, w.hidden), jnp.float32)

    return Case(
        op="matmul",
        name=f"{kind}/t{tokens}",
        make=make,
        run=run,
        reference=reference,
        view=lambda given, out, state, place: (out,),
        moves="x",
        nbytes=nbytes,
        problem=lambda given: problem("matmul", height(tokens, 1), given["weight"]),
        rounds=True,
    )


def _gated(sweep: Sweep, kind: Kind, tokens: int) -> Case:
    w = sweep.widths
    pairs = tokens * w.chosen

    def make(layers: int) -> tuple[Arrays, Arrays]:
        shape = (layers, w.experts, w.expert_width, w.hidden)
        return {
            "x": noise.normal((tokens, w.hidden), 1, sweep.dtype),
            "gate": sweep.weight(shape, kind, 2),
            "up": sweep.weight(shape, kind, 4),
            "blocks": _evenly(pairs, w.experts),
        }, {}

    def call(function: Any, given: Arrays, place: jax.Array, **options: Any) -> jax.Array:
        rows = (given["gate"], given["up"], place)
        return function(given["x"], *rows, blocks=given["blocks"], chosen=w.chosen, **options)

    def nbytes(given: Arrays, state: Arrays) -> int:
        return one_layer(given["gate"], given["up"]) + given["x"].nbytes + size_of((pairs, w.expert_width), sweep.dtype)

    return Case(
        op="gated",
        name=f"{kind}/t{tokens}",
        make=make,
        run=lambda given, state, place, shape: (call(gated, given, place, shape=shape), state),
        reference=lambda given, state, place: (call(gated_ref, given, place), state),
        view=lambda given, out, state, place: (out,),
        moves="x",
        nbytes=nbytes,
        problem=lambda given: problem("gated", height(pairs, w.experts), given["gate"]),
        rounds=True,
    )


def _evenly(pairs: int, experts: int) -> Blocks:
    """Pair i is of expert i modulo their number."""
    size = height(pairs, experts)
    each = -(-pairs // experts)
    per_expert = -(-each // size)
    order = jnp.arange(per_expert * size, dtype=jnp.int32)
    owners = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), per_expert)
    rows = jnp.arange(experts, dtype=jnp.int32)[:, None] + experts * order[None]
    rows = jnp.where(rows < pairs, rows, -1).reshape(-1, size)
    return Blocks(jnp.where(rows[:, 0] < 0, -1, owners), rows)


def _flash(sweep: Sweep, tokens: int) -> Case:
    w = sweep.widths

    def make(layers: int) -> tuple[Arrays, Arrays]:
        head = (1, tokens, w.heads)
        return {
            "q": noise.normal((*head, w.nope + w.rope), 1, sweep.dtype),
            "keys": noise.normal((*head, w.nope), 2, sweep.dtype),
            "rope": noise.normal((1, tokens, w.rope), 3, sweep.dtype),
            "v": noise.normal((*head, w.value), 4, sweep.dtype),
            "positions": jnp.arange(tokens, dtype=jnp.int32)[None],
        }, {}

    def call(function: Any, given: Arrays, place: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        # Zero, and known to nobody who compiles: calls with nothing of their own would be one. It takes a kernel of one
        # number, which is little beside the attention of hundreds of tokens.
        first, scale = jnp.minimum(place, 0), (w.nope + w.rope) ** -0.5
        arrays = (given[name] for name in ("q", "keys", "rope", "v", "positions"))
        return function(*arrays, first, scale=scale, **options)

    def nbytes(given: Arrays, state: Arrays) -> int:
        made = size_of((tokens, w.heads, w.value), sweep.dtype)
        return given["keys"].nbytes + given["v"].nbytes + given["q"].nbytes + given["rope"].nbytes + made

    return Case(
        op="flash",
        name=f"t{tokens}",
        make=make,
        run=lambda given, state, place, shape: (call(flash, given, place, shape=shape), state),
        reference=lambda given, state, place: (call(flash_ref, given, place), state),
        view=lambda given, out, state, place: out,
        moves="q",
        nbytes=nbytes,
        problem=lambda given: flash_problem(
            tokens, w.heads, (w.nope + w.rope, w.value), jnp.dtype(sweep.dtype).itemsize
        ),
        rounds=True,
    )
