"""The loop that operations are timed in, compiled for an absent GPU; runs in a child process."""

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
    """Returns for one round of each specification the kernels by name, CUDA graphs, and launches outside of them."""
    gpu = aot.find_gpu_spec(argument["gpu"])
    sharding = SingleDeviceSharding(aot.topology_devices(gpu)[0])
    sweep = Sweep(batch_sizes=(8,), weight_kinds=("int4",), context_lengths=(8192,), cache_kinds=("int8",))
    counts = {}
    for spec in list_specs(sweep):
        inputs, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(functools.partial(spec.make_inputs, LAYERS)),
        )
        zero, one = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in ((), (1,)))
        with compiling_for(gpu.target):
            program = jax.jit(build_rounds_program(spec, None), donate_argnums=1)
            traced = program.trace(inputs, state, [one] * CALLS, zero, zero)
            report = aot.compile_traced(traced, CUDA_GRAPH_OPTIONS)
        names = Counter(launch.name or launch.kind for launch in report.launches())
        counts[spec.full_name] = {
            "kernels": dict(names),
            "graphs": report.num_cuda_graphs,
            "outside": report.num_ungraphed_launches,
            "temp": report.temp_bytes,
        }
    return counts
