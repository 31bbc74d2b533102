"""The head of the model, which draws its token itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays as noise
from pallas_kernels.quant_matmul.reference import linear_ref
from pallas_kernels.sample import Drawn, Rows, Vocabulary, head
from pallas_kernels.sample.op import head_problem
from pallas_kernels.specs.base import COUNTERS, Arrays, Case, Sweep
from pallas_kernels.tiles import Kind


def head_cases(sweep: Sweep) -> Iterator[Case]:
    """Logits of the whole vocabulary and the highest of them, in every storage of the weight."""
    yield from (_head(sweep, kind, rows) for kind in sweep.kinds for rows in sweep.rows)


def _head(sweep: Sweep, kind: Kind, rows: int) -> Case:
    w = sweep.widths
    vocabulary = Vocabulary(w.vocab - 1)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        # One matrix: there is but one in a model, and no cache holds it.
        weight = sweep.weight((w.vocab, w.hidden), kind, 2)
        numbers = {"zeros": jnp.zeros(rows), "seeds": jnp.zeros((rows, 2), jnp.uint32)}
        given = {"x": noise.normal((rows, w.hidden), 1, sweep.dtype), "weight": weight, **numbers}
        return given, {"counters": jnp.zeros(COUNTERS, jnp.int32)}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[Drawn, Arrays]:
        zeros, seeds = given["zeros"], given["seeds"]
        # Greedy rows look at no number but their temperature; the place is there so that no two calls are the same.
        asked = Rows(temperature=zeros, top_k=place, top_p=zeros, min_p=zeros, seeds=seeds, positions=place)
        found, counters = head(
            given["x"], given["weight"], asked, vocabulary, state["counters"], drawn=False, shape=shape
        )
        return found, {"counters": counters}

    def logits(given: Arrays) -> jax.Array:
        stack = jax.tree.map(lambda array: array[None], given["weight"])
        made = linear_ref(given["x"], stack, jnp.zeros(1, jnp.int32), dtype=jnp.float32)
        return made.out[:, : vocabulary.valid]

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[Drawn, Arrays]:
        return Drawn(jnp.argmax(logits(given), axis=1).astype(jnp.int32), jnp.ones(rows, bool)), state

    def view(given: Arrays, found: Drawn, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
        # Of two tokens that are as good but for rounding it may be either: what must agree is how good it is.
        best = jnp.take_along_axis(logits(given), found.tokens[:, None], axis=1)
        return best, found.ok.astype(jnp.float32), state["counters"][:rows].astype(jnp.float32)

    return Case(
        op="head",
        name=f"{kind}/m{rows}",
        make=make,
        run=run,
        reference=reference,
        view=view,
        moves="x",
        nbytes=lambda given, state: given["weight"].nbytes + given["x"].nbytes,
        problem=lambda given: head_problem(rows, given["weight"]),
    )
