"""The loop that operations are timed in, compiled for a card that is not here; runs in a child process."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels import CUDA_GRAPH_OPTIONS, aot, compiling_for
from pallas_kernels.specs import Sweep, list_specs
from pallas_kernels.timing import build_rounds_program

LAYERS, CALLS = 3, 6


def count_launches(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Of one round of each case of an operation: kernels by name, CUDA graphs, what is in none."""
    card = aot.find_gpu_spec(argument["gpu"])
    place = SingleDeviceSharding(aot.topology_devices(card)[0])
    sweep = Sweep(batch_sizes=(8,), weight_kinds=("int4",), context_lengths=(8192,), cache_kinds=("int8",))
    found = {}
    for case in list_specs(sweep):
        given, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(functools.partial(case.make_inputs, LAYERS)),
        )
        zero, one = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for shape in ((), (1,)))
        with compiling_for(card.target):
            program = jax.jit(build_rounds_program(case, None), donate_argnums=1)
            traced = program.trace(given, state, [one] * CALLS, zero, zero)
            report = aot.compile_traced(traced, CUDA_GRAPH_OPTIONS)
        names = Counter(launch.name or launch.kind for launch in report.launches())
        found[case.full_name] = {
            "kernels": dict(names), "graphs": report.num_cuda_graphs, "outside": report.num_ungraphed_launches, "temp": report.temp_bytes
        }  # fmt: skip
    return found
