"""How long work on a device takes: the bandwidth of its memory, and operations in a loop that never leaves it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._launch import CUDA_GRAPH_OPTIONS
from pallas_kernels.specs.base import KernelSpec

_COPY_BYTES, _COPIES = 1 << 30, 10
# What is read between two uses of the same weights, so that none is found in a cache: twice the largest known.
_CACHE_FLUSH_BYTES = 2 * (128 << 20)
_MIN_CALLS, _MAX_CALLS, _MAX_BYTES = 32, 128, 6 << 30


def measure_copy_bandwidth(repeats: int = 5) -> float:
    """Bytes per second, read and written, of copies of a GiB on the default device: the best of ``repeats``.

    It is what kernels are compared with: how fast this memory is on this day, and not by a data sheet.
    """
    data = jax.block_until_ready(jnp.zeros(_COPY_BYTES // 4, jnp.uint32))
    copy = jax.jit(jnp.copy)  # the result is another array, so there is something to copy
    latest = jax.block_until_ready(copy(data))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(_COPIES):
            latest = copy(data)  # the one before is freed: there are never more than two
        jax.block_until_ready(latest)
        best = min(best, (time.perf_counter() - started) / _COPIES)
    return 2 * data.nbytes / best


@dataclasses.dataclass(frozen=True, slots=True)
class TimedLoop:
    """An operation many times over, with other weights each time.

    Attributes:
        run_rounds: ``run_rounds(n)`` runs n rounds, and waits for them.
        calls_per_round: of the operation in a round.
    """

    run_rounds: Callable[[int], None]
    calls_per_round: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpecArrays:
    """The arrays of a case, in enough layers that the card's caches do not hold what is read again.

    Attributes:
        spec: the operation.
        inputs: what it reads.
        state: what it takes over.
        layers: their number.
        nbytes: that one call must read and write.
        cached: whether a card's cache may hold all that the calls read.
    """

    spec: KernelSpec
    inputs: Any
    state: Any
    layers: int
    nbytes: int
    cached: bool = False


def make_arrays(spec: KernelSpec) -> SpecArrays:
    """Makes the arrays of a case on the default device."""
    make = jax.jit(spec.make_inputs, static_argnums=0)
    given, state = make(1)
    nbytes, held = spec.bytes_accessed(given, state), sum(x.nbytes for x in jax.tree.leaves((given, state)))
    most = max(2, min(_MAX_CALLS, _MAX_BYTES // held))
    layers = int(np.clip(-(-_CACHE_FLUSH_BYTES // nbytes), 2, most))
    given, state = make(layers)
    return SpecArrays(spec, given, state, layers, nbytes, cached=layers * nbytes < _CACHE_FLUSH_BYTES // 2)


def build_loop(arrays: SpecArrays, config: Any = None) -> TimedLoop:
    """A case as a loop on the device; its state is copied.

    Args:
        arrays: of the case.
        config: block sizes; chosen unless given.
    """
    calls = arrays.layers * -(-_MIN_CALLS // arrays.layers)
    program = jax.jit(
        build_rounds_program(arrays.spec, config),
        donate_argnums=1,
        compiler_options=CUDA_GRAPH_OPTIONS if jax.default_backend() == "gpu" else None,
    )
    places = [jnp.full(1, call % arrays.layers, jnp.int32) for call in range(calls)]
    held, zero = [jax.tree.map(jnp.copy, arrays.state)], jnp.zeros((), jnp.int32)

    def rounds(count: int) -> None:
        held[0], outs = program(arrays.inputs, held[0], places, zero, np.int32(count))
        jax.block_until_ready(outs)

    return TimedLoop(rounds, calls)


def build_rounds_program(spec: KernelSpec, config: Any) -> Callable[..., Any]:
    """``(given, state, places, zero, count)`` to the state and the last results: rounds of a call for each place.

    Nothing may keep XLA from making every call, and nothing else may cost time: ``zero`` is added to an array
    of the activations once a round, or calls without a state would be moved out of the loop; places are data, or equal
    ones would be made once; and all results are kept.
    """

    def call(given: Any, moved: Any, state: Any, place: jax.Array) -> tuple[list[jax.Array], Any]:
        given = {**given, spec.activation_key: moved}
        out, state = spec.run(given, state, place, config)
        read = {id(x) for x in jax.tree.leaves(given)}  # an argument handed on would be copied to be kept
        return list({id(x): x for x in jax.tree.leaves(out) if id(x) not in read}.values()), state

    def run(given: Any, state: Any, places: list[jax.Array], zero: jax.Array, count: jax.Array) -> Any:
        made = jax.eval_shape(lambda place: call(given, given[spec.activation_key], state, place)[0], places[0])
        nothing = [[jnp.zeros(x.shape, x.dtype) for x in made] for _ in places]

        def one(_: jax.Array, carry: Any) -> Any:
            moved, state, outs = carry
            outs = []
            for place in places:
                out, state = call(given, moved, state, place)
                outs.append(out)
            (first, *others), tree = jax.tree.flatten(moved)
            moved = jax.tree.unflatten(tree, [first + zero.astype(first.dtype), *others])
            return moved, state, outs

        _, state, outs = jax.lax.fori_loop(0, count, one, (given[spec.activation_key], state, nothing))
        return state, outs

    return run


def measure_seconds_per_call(timed_loop: TimedLoop, *, repeats: int = 7, min_seconds: float = 0.02) -> float:
    """Median of some runs, each of at least so many seconds."""
    timed_loop.run_rounds(1)
    started = time.perf_counter()
    timed_loop.run_rounds(1)
    once = max(time.perf_counter() - started, 1e-6)
    count = min(max(1, math.ceil(min_seconds / once)), 100_000)
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        timed_loop.run_rounds(count)
        taken.append((time.perf_counter() - started) / count)
    return statistics.median(taken) / timed_loop.calls_per_round
