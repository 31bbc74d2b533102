"""Compiles the decode loop for a GPU that need not be present, in a child process."""

from __future__ import annotations

import dataclasses
import sys
from typing import TypedDict, cast

from glm_jax.config import Config
from glm_jax.errors import MemoryPlanError
from glm_jax.memory import MemoryPlan, format_bytes, parse_gpus
from glm_jax.model.fused_decode import MAX_TOKENS
from glm_jax.plan.options import PlanOptions
from pallas_kernels import aot

_ATTENTION_KERNEL = "flash_decode_kernel"  # part of every decode step that runs the fused kernels


class CompiledLoop(TypedDict):
    """Facts about the compiled decode loop.

    Attributes:
        launches_per_token: Kernels launched per decode step.
        graph_pieces: Number of CUDA graphs.
        launches_outside_graphs: Launches that are part of no CUDA graph.
        copies_per_token: Copies between buffers per decode step.
        temp_bytes: Bytes of temporaries on each GPU.
        argument_bytes: Bytes of weights, cache and state on each GPU.
        fits: Whether both fit in the GPU's memory.
        collectives: Exchanges between GPUs in one decode step.
        kernels: Launches per decode step by kernel name.
    """

    launches_per_token: int
    graph_pieces: int
    launches_outside_graphs: int
    copies_per_token: int
    temp_bytes: int
    argument_bytes: int
    fits: bool
    collectives: list[str]
    kernels: dict[str, int]


def compile_for_gpu(cfg: Config, plan: MemoryPlan, options: PlanOptions) -> CompiledLoop:
    """Compiles the decode loop of a planned model for the GPUs of ``--gpu``.

    Raises:
        MemoryPlanError: if no GPU is named, the dtype is not bfloat16, or compilation fails.
    """
    if options.gpu is None:
        raise MemoryPlanError(f"--compile is for a GPU by name: add --gpu, one of {', '.join(aot.load_gpu_specs())}")
    if options.dtype != "bfloat16":
        raise MemoryPlanError("--compile is for the hand-written kernels, which compute in bfloat16: leave --dtype out")
    gpu, count = parse_gpus(options.gpu)
    placement = plan.memory_model.placement
    argument = {
        "gpu": gpu.name,
        "devices": count,
        "config": dataclasses.asdict(cfg),
        "storage": placement.storage.to_json(),
        "batch": plan.sequences,
        "context": plan.context,
        "cache_dtype": placement.cache_dtype,
    }
    print(f"compiling the decode loop for {options.gpu} ...", file=sys.stderr)
    try:
        facts = aot.run_in_child("glm_jax.engine.aot:compile_decode", argument)
    except aot.AotError as error:
        raise MemoryPlanError(str(error)) from None
    return cast(CompiledLoop, {name: facts[name] for name in CompiledLoop.__annotations__})


def compiled_summary(compiled: CompiledLoop) -> str:
    """Returns the facts about the compiled loop in a sentence."""
    num_graphs, num_collectives = compiled["graph_pieces"], len(compiled["collectives"])
    single = num_graphs == 1 and not compiled["launches_outside_graphs"]
    graphs = "one CUDA graph" if single else f"{num_graphs} CUDA graphs"
    collectives = f", {num_collectives} of them exchanges between devices," if num_collectives else ""
    loop = "with the host going round the loop" if num_collectives else "for the whole loop"
    total = format_bytes(compiled["argument_bytes"] + compiled["temp_bytes"])
    summary = (
        f"compiled: {compiled['launches_per_token']} kernels per token{collectives} in {graphs} {loop}; {total} of "
        f"weights, cache and state on each GPU, {compiled['temp_bytes'] / 1e6:,.1f} MB of them temporaries, which "
        f"{'fits' if compiled['fits'] else 'does not fit'} (kernels are compiled, not run or timed)"
    )
    if _ATTENTION_KERNEL not in compiled["kernels"]:
        summary += f"; the fused kernels of a decode step take at most {MAX_TOKENS} tokens at a time"
    return summary
