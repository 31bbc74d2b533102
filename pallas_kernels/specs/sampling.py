"""The head of the model, which draws its token itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels.quant_matmul.reference import fused_linear_ref
from pallas_kernels.sample import SampleOutput, SamplingTensors, Vocabulary, lm_head_sample
from pallas_kernels.sample.op import lm_head_sample_tuning_key
from pallas_kernels.specs.base import NUM_COUNTERS, Arrays, KernelSpec, Sweep
from pallas_kernels.tiles import WeightKind


def lm_head_sample_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Logits of the whole vocabulary and the highest of them, in every storage of the weight."""
    yield from (_lm_head_sample_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def _lm_head_sample_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    w = sweep.dims
    vocabulary = Vocabulary(w.vocab - 1)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        # One matrix: there is but one in a model, and no cache holds it.
        weight = sweep.random_weight((w.vocab, w.hidden), kind, 2)
        numbers = {"zeros": jnp.zeros(rows), "seeds": jnp.zeros((rows, 2), jnp.uint32)}
        given = {"x": random_arrays.random_normal((rows, w.hidden), 1, sweep.dtype), "weight": weight, **numbers}
        return given, {"counters": jnp.zeros(NUM_COUNTERS, jnp.int32)}

    def run(given: Arrays, state: Arrays, place: jax.Array, shape: Any) -> tuple[SampleOutput, Arrays]:
        zeros, seeds = given["zeros"], given["seeds"]
        # Greedy rows look at no number but their temperature; the place is there so that no two calls are the same.
        asked = SamplingTensors(temperature=zeros, top_k=place, top_p=zeros, min_p=zeros, seeds=seeds, positions=place)
        found, counters = lm_head_sample(
            given["x"], given["weight"], asked, vocabulary, state["counters"], has_random=False, config=shape
        )
        return found, {"counters": counters}

    def logits(given: Arrays) -> jax.Array:
        stack = jax.tree.map(lambda array: array[None], given["weight"])
        made = fused_linear_ref(given["x"], stack, jnp.zeros(1, jnp.int32), dtype=jnp.float32)
        return made.out[:, : vocabulary.valid_size]

    def reference(given: Arrays, state: Arrays, place: jax.Array) -> tuple[SampleOutput, Arrays]:
        return SampleOutput(jnp.argmax(logits(given), axis=1).astype(jnp.int32), jnp.ones(rows, bool)), state

    def view(given: Arrays, found: SampleOutput, state: Arrays, place: jax.Array) -> tuple[jax.Array, ...]:
        # Of two tokens that are as good but for rounding it may be either: what must agree is how good it is.
        best = jnp.take_along_axis(logits(given), found.tokens[:, None], axis=1)
        return best, found.ok.astype(jnp.float32), state["counters"][:rows].astype(jnp.float32)

    return KernelSpec(
        op="head",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        reference=reference,
        comparable_outputs=view,
        activation_key="x",
        bytes_accessed=lambda given, state: given["weight"].nbytes + given["x"].nbytes,
        tuning_key=lambda given: lm_head_sample_tuning_key(rows, given["weight"]),
    )
