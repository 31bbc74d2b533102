"""The head of the model, which samples its token itself."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import random_arrays
from pallas_kernels._implementation import Implementation
from pallas_kernels.quant_matmul.config import LinearConfig
from pallas_kernels.quant_matmul.reference import matmul_ref
from pallas_kernels.sample import SampleOutput, SamplingTensors, Vocabulary, lm_head_sample
from pallas_kernels.sample.op import lm_head_sample_tuning_key
from pallas_kernels.specs.base import NUM_COUNTERS, Arrays, KernelSpec, Sweep
from pallas_kernels.tiles import WeightKind


def lm_head_sample_specs(sweep: Sweep) -> Iterator[KernelSpec]:
    """Yields the logits of the whole vocabulary and the highest of them, in every storage of the weight."""
    yield from (_lm_head_sample_spec(sweep, kind, rows) for kind in sweep.weight_kinds for rows in sweep.batch_sizes)


def _lm_head_sample_spec(sweep: Sweep, kind: WeightKind, rows: int) -> KernelSpec:
    dims = sweep.dims
    vocabulary = Vocabulary(dims.vocab - 1)

    def make(layers: int) -> tuple[Arrays, Arrays]:
        # One matrix for any number of layers: a model has one head, and no cache of a GPU holds it.
        return {
            "x": random_arrays.random_normal((rows, dims.hidden), 1, sweep.dtype),
            "weight": sweep.random_weight((dims.vocab, dims.hidden), kind, 2),
            "zeros": jnp.zeros(rows),
            "seeds": jnp.zeros((rows, 2), jnp.uint32),
        }, {"counters": jnp.zeros(NUM_COUNTERS, jnp.int32)}

    def run(
        inputs: Arrays,
        state: Arrays,
        layer_index: jax.Array,
        config: LinearConfig | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[SampleOutput, Arrays]:
        zeros, seeds = inputs["zeros"], inputs["seeds"]
        # Greedy rows read only their temperature; the layer index makes every call a different one to XLA.
        sampling = SamplingTensors(
            temperature=zeros, top_k=layer_index, top_p=zeros, min_p=zeros, seeds=seeds, positions=layer_index
        )
        result, counters = lm_head_sample(
            inputs["x"], inputs["weight"], sampling, vocabulary, state["counters"], has_random=False, config=config,
            implementation=implementation,
        )  # fmt: skip
        return result, {"counters": counters}

    def view(inputs: Arrays, result: SampleOutput, state: Arrays, layer_index: jax.Array) -> tuple[jax.Array, ...]:
        # Of two tokens that are equally good but for rounding, either may be sampled: their logits must agree.
        stack = jax.tree.map(lambda array: array[None], inputs["weight"])
        logits = matmul_ref(inputs["x"].astype(jnp.float32), stack, jnp.int32(0))[:, : vocabulary.valid_size]
        best = jnp.take_along_axis(logits, result.tokens[:, None], axis=1)
        return best, result.ok.astype(jnp.float32), state["counters"][:rows].astype(jnp.float32)

    return KernelSpec(
        op="head",
        name=f"{kind}/m{rows}",
        make_inputs=make,
        run=run,
        comparable_outputs=view,
        activation_key="x",
        bytes_accessed=lambda inputs, state: inputs["weight"].nbytes + inputs["x"].nbytes,
        tuning_key=lambda inputs: lm_head_sample_tuning_key(rows, inputs["weight"]),
    )
