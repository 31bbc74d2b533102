"""Makes and prints the plan that the options ask for."""

from __future__ import annotations

import json
import sys

from glm_jax.checkpoint.sources.inspect import load_config_and_storage
from glm_jax.config import Config
from glm_jax.errors import MemoryPlanError
from glm_jax.memory import (
    MemoryPlan,
    MemoryPlanOptions,
    default_rules,
    parse_gpus,
    plan_memory_on_devices,
    plan_memory_on_gpus,
    resolve_storage,
)
from glm_jax.plan.compiled_loop import compile_for_gpu, compiled_summary
from glm_jax.plan.options import PlanOptions
from glm_jax.plan.report_tables import print_plan
from glm_jax.sharding import make_mesh
from glm_jax.weights.storage import Storage


def plan_and_print(options: PlanOptions) -> None:
    """Plans the model and prints tables or JSON.

    Raises:
        GlmError: if an option is invalid or the model cannot be read.
    """
    cfg, stored = load_config_and_storage(options.model)
    if options.gpu is None:
        location, plan = _plan_on_local_devices(cfg, stored, options)
    else:
        location, plan = _plan_on_gpus(options.gpu, cfg, stored, options)
    compiled = compile_for_gpu(cfg, plan, options) if options.compile else None
    if options.json:
        print(json.dumps({"model": options.model, "on": location, **plan.to_json(), **(compiled or {})}))
        return
    print_plan(options.model, location, plan)
    if compiled:
        print(compiled_summary(compiled))


def _plan_on_gpus(gpus: str, cfg: Config, stored: Storage, options: PlanOptions) -> tuple[str, MemoryPlan]:
    """Returns the devices in words and the plan."""
    if options.mesh is not None:
        raise MemoryPlanError(f"--mesh is for local devices: write --gpu {gpus}x{options.mesh}")
    gpu, count = parse_gpus(gpus)
    plan_options = _plan_options(cfg, stored, options, count)
    plan = plan_memory_on_gpus(cfg, gpu, count, memory_fraction=options.memory_fraction, **plan_options)
    return f"{count} x {gpu.name}", plan


def _plan_on_local_devices(cfg: Config, stored: Storage, options: PlanOptions) -> tuple[str, MemoryPlan]:
    """Returns the devices in words and the plan."""
    mesh = make_mesh(1 if options.mesh is None else options.mesh)
    kind = mesh.devices.flat[0].device_kind
    if kind == "cpu" and options.cache_dtype is None and options.dtype == "bfloat16":
        print(
            "note: on CPUs LLM.load keeps the cache in float32: add --cache-dtype float32 to plan that", file=sys.stderr
        )
    plan_options = _plan_options(cfg, stored, options, mesh.size)
    return f"{mesh.size} x {kind}", plan_memory_on_devices(cfg, mesh, **plan_options)


def _plan_options(cfg: Config, stored: Storage, options: PlanOptions, num_devices: int) -> MemoryPlanOptions:
    return {
        "dtype": options.dtype,
        "storage": resolve_storage(cfg, stored, options.quantize, num_devices),
        "cache_dtype": options.cache_dtype,
        "rules": default_rules(num_devices),
        "context": options.context,
        "sequences": options.sequences,
        "mtp": options.mtp,
    }
