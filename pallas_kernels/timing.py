"""Timing on a device: the bandwidth of its memory, and operations in a loop that never leaves it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._launch import CUDA_GRAPH_OPTIONS
from pallas_kernels.specs.base import Arrays, KernelSpec

_COPY_BYTES, _COPIES = 1 << 30, 10
# Bytes read between two uses of the same weights, so that no cache has them: twice the largest known cache.
_CACHE_FLUSH_BYTES = 2 * (128 << 20)
_MIN_CALLS, _MAX_CALLS, _MAX_BYTES = 32, 128, 6 << 30

# ``(inputs, state, layer_indices, zero, count)`` to the new state and the results of the last round.
RoundsProgram: TypeAlias = Callable[
    [Arrays, Arrays, list[jax.Array], jax.Array, jax.Array], tuple[Arrays, list[list[jax.Array]]]
]


def measure_copy_bandwidth(repeats: int = 5) -> float:
    """Returns bytes per second, read and written, of copies of a GiB on the default device: the best of ``repeats``.

    Kernels are compared with it, because it is the speed of this memory on this day rather than that of a data sheet.
    """
    data = jax.block_until_ready(jnp.zeros(_COPY_BYTES // 4, jnp.uint32))
    copy = jax.jit(jnp.copy)  # without donation, so that there is something to copy
    latest = jax.block_until_ready(copy(data))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(_COPIES):
            latest = copy(data)  # frees the previous copy: there are never more than two
        jax.block_until_ready(latest)
        best = min(best, (time.perf_counter() - started) / _COPIES)
    return 2 * data.nbytes / best


@dataclasses.dataclass(frozen=True, slots=True)
class TimedLoop:
    """An operation repeated with other weights each time.

    Attributes:
        run_rounds: ``run_rounds(n)`` runs n rounds and waits for them.
        calls_per_round: Calls of the operation in a round.
    """

    run_rounds: Callable[[int], None]
    calls_per_round: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpecArrays:
    """The arrays of a specification, in so many layers that no cache of the GPU has the weights of the next call.

    Attributes:
        spec: Specification of the operation.
        inputs: Arrays that it reads.
        state: Arrays that it updates.
        layers: Number of layers.
        nbytes: Bytes that one call must read and write.
        cached: Whether a cache may hold all the layers nevertheless.
    """

    spec: KernelSpec
    inputs: Arrays
    state: Arrays
    layers: int
    nbytes: int
    cached: bool = False


def make_arrays(spec: KernelSpec) -> SpecArrays:
    """Creates the arrays of a specification on the default device."""
    make = jax.jit(spec.make_inputs, static_argnums=0)
    inputs, state = make(1)
    nbytes = spec.bytes_accessed(inputs, state)
    layer_bytes = sum(x.nbytes for x in jax.tree.leaves((inputs, state)))
    max_layers = max(2, min(_MAX_CALLS, _MAX_BYTES // layer_bytes))
    layers = int(np.clip(-(-_CACHE_FLUSH_BYTES // nbytes), 2, max_layers))
    inputs, state = make(layers)
    return SpecArrays(spec, inputs, state, layers, nbytes, cached=layers * nbytes < _CACHE_FLUSH_BYTES // 2)


def build_loop(arrays: SpecArrays, config: Any = None) -> TimedLoop:
    """Builds a loop on the device over the calls of a specification, with a copy of its state.

    Args:
        arrays: Arrays of the specification.
        config: Block sizes; tuned or heuristic by default.
    """
    calls = arrays.layers * -(-_MIN_CALLS // arrays.layers)
    program = jax.jit(
        build_rounds_program(arrays.spec, config),
        donate_argnums=1,
        compiler_options=CUDA_GRAPH_OPTIONS if jax.default_backend() == "gpu" else None,
    )
    layer_indices = [jnp.full(1, call % arrays.layers, jnp.int32) for call in range(calls)]
    state, zero = [jax.tree.map(jnp.copy, arrays.state)], jnp.zeros((), jnp.int32)

    def run_rounds(count: int) -> None:
        state[0], results = program(arrays.inputs, state[0], layer_indices, zero, np.int32(count))
        jax.block_until_ready(results)

    return TimedLoop(run_rounds, calls)


def build_rounds_program(spec: KernelSpec, config: Any) -> RoundsProgram:
    """Builds a program of ``count`` rounds with one call for each layer index.

    XLA must neither skip a call nor add work. So ``zero`` is added to an array of the activations once a round, or
    calls without a state would be moved out of the loop; layer indices are data, or equal calls would be merged; and
    all results are kept.
    """

    def call(inputs: Arrays, activations: Any, state: Arrays, layer_index: jax.Array) -> tuple[list[jax.Array], Arrays]:
        inputs = {**inputs, spec.activation_key: activations}
        result, state = spec.run(inputs, state, layer_index, config)
        read = {id(x) for x in jax.tree.leaves(inputs)}  # an input among the results would be copied to be kept
        return list({id(x): x for x in jax.tree.leaves(result) if id(x) not in read}.values()), state

    def run(
        inputs: Arrays, state: Arrays, layer_indices: list[jax.Array], zero: jax.Array, count: jax.Array
    ) -> tuple[Arrays, list[list[jax.Array]]]:
        first_activations = inputs[spec.activation_key]
        shapes = jax.eval_shape(lambda index: call(inputs, first_activations, state, index)[0], layer_indices[0])
        no_results = [[jnp.zeros(x.shape, x.dtype) for x in shapes] for _ in layer_indices]

        def run_round(_: jax.Array, carry: tuple[Any, Arrays, Any]) -> tuple[Any, Arrays, Any]:
            activations, state, _ = carry
            results = []
            for layer_index in layer_indices:
                result, state = call(inputs, activations, state, layer_index)
                results.append(result)
            (first, *others), tree = jax.tree.flatten(activations)
            activations = jax.tree.unflatten(tree, [first + zero.astype(first.dtype), *others])
            return activations, state, results

        _, state, results = jax.lax.fori_loop(0, count, run_round, (first_activations, state, no_results))
        return state, results

    return run


def measure_seconds_per_call(timed_loop: TimedLoop, *, repeats: int = 7, min_seconds: float = 0.02) -> float:
    """Returns the median over ``repeats`` runs of at least ``min_seconds`` each, in seconds per call."""
    timed_loop.run_rounds(1)
    started = time.perf_counter()
    timed_loop.run_rounds(1)
    seconds_per_round = max(time.perf_counter() - started, 1e-6)
    count = min(max(1, math.ceil(min_seconds / seconds_per_round)), 100_000)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        timed_loop.run_rounds(count)
        seconds.append((time.perf_counter() - started) / count)
    return statistics.median(seconds) / timed_loop.calls_per_round
