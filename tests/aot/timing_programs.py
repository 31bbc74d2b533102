"""The loop that operations are timed in, compiled for a card that is not here; runs in a child process."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels import GRAPH_OPTIONS, aot, compiling_for
from pallas_kernels.specs import Sweep, cases
from pallas_kernels.timing import rounds_program

LAYERS, CALLS = 3, 6


def launches(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Of one round of each case of an operation: kernels by name, CUDA graphs, what is in none."""
    card = aot.card(argument["gpu"])
    place = SingleDeviceSharding(aot.devices(card)[0])
    sweep = Sweep(rows=(8,), kinds=("int4",), contexts=(8192,), caches=("int8",))
    found = {}
    for case in cases(sweep):
        given, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(functools.partial(case.make, LAYERS)),
        )
        zero, one = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for shape in ((), (1,)))
        with compiling_for(card.target):
            program = jax.jit(rounds_program(case, None), donate_argnums=1)
            traced = program.trace(given, state, [one] * CALLS, zero, zero)
            report = aot.compile_traced(traced, GRAPH_OPTIONS)
        names = Counter(launch.name or launch.kind for launch in report.launches())
        found[case.full_name] = {
            "kernels": dict(names), "graphs": report.graphs, "outside": report.outside, "temp": report.temp_bytes
        }  # fmt: skip
    return found
