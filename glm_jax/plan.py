"""``python -m glm_jax.plan``: what a model needs in memory, and whether it fits, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from glm_jax.cli.common import OK, run_and_exit, set_memory_fraction
from glm_jax.errors import CheckpointError, MemoryPlanError

if TYPE_CHECKING:
    from rich.table import Table

    from glm_jax.config import Config
    from glm_jax.memory import MemoryPlan
    from glm_jax.sharding import Rules
    from glm_jax.weights.storage import Storage

DESCRIPTION = """\
Plan a model's memory: weights by part, cache, longest context, sequences at once, and the bound that memory bandwidth
sets on decoding. Reads config.json only; nothing is loaded. The exit code is 0 whether it fits or not (--json says
"fits"), 2 for bad input.

Examples:
  python -m glm_jax.plan --model zai-org/GLM-4.7-Flash                on the device at hand
  python -m glm_jax.plan --model synthetic:flash --gpu h100           on a card that is not here
  python -m glm_jax.plan --model synthetic:flash --gpu b200x4 --context 32768 --sequences 64
  python -m glm_jax.plan --model ./converted --gpu rtxpro6000 --json | jq .max_context
  python -m glm_jax.plan --model synthetic:flash --gpu h200 --quantize int4 --context 8192 --compile

Cards: rtx6000-ada rtxpro6000 h100 h200 b200; for memory only: a100-80gb l40s rtx5090 rtx4090 rtx3090.
Several (NAMExN, or --mesh) share the model by attention heads and expert widths; each holds the whole cache.
"""


@dataclasses.dataclass
class PlanOptions:
    """Options of the command."""

    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=4"."""
    gpu: str | None = None
    """A card, or several: h100, b200x4. The device at hand unless given."""
    mesh: int | None = None
    """Number of the devices at hand to split the model over."""
    quantize: str | None = None
    """int4, int4-small, int4-experts or int8: plan the weights quantized so."""
    context: int | None = None
    """Tokens per sequence, prompt and completion together; the longest that fits unless given."""
    sequences: int = 1
    """Sequences at once (a batch is padded to a power of two: give that number)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights that are not quantized."""
    cache_dtype: Literal["bfloat16", "float32", "int8", "fp8"] | None = None
    """Of the latent cache; that of the weights unless given."""
    mtp: bool = True
    """Count the multi-token-prediction layer, which is loaded with the model."""
    memory_fraction: float = 0.95
    """Part of a GPU's memory that JAX may take."""
    compile: bool = False
    """Also compile the generation loop for the card of --gpu, which need not be here: kernels per token, CUDA graphs,
    memory. Takes a minute, and the packages of glm-jax[aot]."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = tyro.cli(PlanOptions, prog="python -m glm_jax.plan", description=DESCRIPTION, args=args)
    set_memory_fraction(options.memory_fraction)
    # Asking a GPU for its size should not take its memory from others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cfg, stored = load_config_and_storage(options.model)
    where, plan = _make_plan(cfg, stored, options)
    compiled = _compile_decode_loop(cfg, plan, options) if options.compile else {}
    if options.json:
        print(json.dumps({"model": options.model, "on": where, **plan.to_json(), **compiled}))
    else:
        _print_plan(options.model, where, plan)
        if compiled:
            print(_compiled_summary(compiled))
    return OK


def _compile_decode_loop(cfg: Config, plan: MemoryPlan, options: PlanOptions) -> dict[str, Any]:
    """What the generation loop becomes on the card."""
    from glm_jax.memory import parse_gpus
    from pallas_kernels import aot

    if options.gpu is None:
        raise MemoryPlanError(f"--compile is for a card by name: add --gpu, one of {', '.join(aot.load_gpu_specs())}")
    if options.dtype != "bfloat16":
        raise MemoryPlanError("--compile is of the hand-written kernels, which compute in bfloat16: leave --dtype out")
    gpu, count = parse_gpus(options.gpu)
    argument = {
        "gpu": gpu.name,
        "devices": count,
        "config": dataclasses.asdict(cfg),
        "storage": plan.memory_model.placement.storage.to_json(),
        "batch": plan.sequences,
        "context": plan.context,
        "cache_dtype": plan.memory_model.placement.cache_dtype,
    }
    print(f"compiling the generation loop for {options.gpu} ...", file=sys.stderr)
    try:
        made = aot.run_in_child("glm_jax.engine.aot:decode", argument)
    except aot.AotError as error:
        raise MemoryPlanError(str(error)) from None
    names = ("launches_per_token", "graph_pieces", "launches_outside_graphs", "copies_per_token", "temp_bytes")
    return {name: made[name] for name in (*names, "argument_bytes", "fits", "collectives", "kernels")}


def _compiled_summary(compiled: Mapping[str, Any]) -> str:
    from glm_jax.memory import format_bytes
    from glm_jax.model.fused_decode import MAX_TOKENS

    graphs, sums = compiled["graph_pieces"], len(compiled["collectives"])
    pieces = "one CUDA graph" if graphs == 1 and not compiled["launches_outside_graphs"] else f"{graphs} CUDA graphs"
    among = f", {sums} of them exchanges between devices," if sums else ""
    loop = "with the host going round the loop" if sums else "for the whole loop"
    needs = format_bytes(compiled["argument_bytes"] + compiled["temp_bytes"])
    made = (
        f"compiled: {compiled['launches_per_token']} kernels per token{among} in {pieces} {loop}; {needs} of weights, "
        f"cache and state on each GPU, {compiled['temp_bytes'] / 1e6:,.1f} MB of them temporaries, which "
        f"{'fits' if compiled['fits'] else 'does not fit'} (kernels are compiled, not run or timed)"
    )
    if "attend_kernel" not in compiled["kernels"]:
        made += f"; more than {MAX_TOKENS} tokens at a time are not for the fused kernels of a decode step"
    return made


def load_config_and_storage(model: str) -> tuple[Config, Storage]:
    """The architecture behind a source string and how its weights are quantized, from configs and headers alone.

    Raises:
        CheckpointError: if there is none.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """
    from glm_jax.checkpoint.sources.base import source_storage
    from glm_jax.checkpoint.sources.hub import is_hub_id
    from glm_jax.checkpoint.sources.open import TINY_MODEL, is_gguf, open_source
    from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX, SyntheticSpec
    from glm_jax.weights.storage import Storage

    if model.startswith(SYNTHETIC_PREFIX):
        return SyntheticSpec.parse(model).cfg, Storage()
    path = Path(__file__).parent / "tiny" if model == TINY_MODEL else Path(os.path.expanduser(model))
    if model and path.is_dir() and not is_gguf(path):
        return _read_folder(path)
    if model and path.exists():
        source = open_source(path)
        return source.cfg, source_storage(source)
    if not is_hub_id(model):
        raise CheckpointError(f"there is no folder {model}, and it is not a hub id such as zai-org/GLM-4.7-Flash")
    return _read_folder(_download_config(model))


def _read_folder(folder: Path) -> tuple[Config, Storage]:
    from glm_jax.checkpoint.folder.manifest import is_converted_folder, load_manifest
    from glm_jax.checkpoint.formats.quantization_config import MODELOPT_CONFIG_NAME, QUANTIZATION_CONFIG_KEYS
    from glm_jax.checkpoint.sources.base import read_hf_config, source_storage
    from glm_jax.checkpoint.sources.folder import manifest_storage
    from glm_jax.checkpoint.sources.open import open_source
    from glm_jax.config import Config
    from glm_jax.weights.storage import Storage

    if is_converted_folder(folder):
        return manifest_storage(load_manifest(folder))
    config = read_hf_config(folder)
    quantized = any(config.get(key) for key in QUANTIZATION_CONFIG_KEYS) or (folder / MODELOPT_CONFIG_NAME).exists()
    if quantized and any(folder.glob("*.safetensors")):
        source = open_source(folder)
        return source.cfg, source_storage(source)
    if quantized:
        print(
            "note: these weights are quantized, and how can be seen in the files alone: planned as if they were not "
            "(give a local folder, or --quantize)",
            file=sys.stderr,
        )
    return Config.from_hf(config), Storage()


def _download_config(repo: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, "config.json")).parent
    except (errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"there is no folder {repo}, and its config.json cannot be had from Hugging Face ({reason}): check the "
            "name, log in with `hf auth login` if the repository is private or gated, or give a folder's path"
        ) from None


def _make_plan(cfg: Config, stored: Storage, options: PlanOptions) -> tuple[str, MemoryPlan]:
    """Where, in words, and the plan."""
    from glm_jax.memory import parse_gpus, plan_memory

    if options.gpu is None:
        return _plan_on_local_devices(cfg, stored, options)
    if options.mesh is not None:
        raise MemoryPlanError(f"--mesh is for the devices at hand: write --gpu {options.gpu}x{options.mesh}")
    gpu, count = parse_gpus(options.gpu)
    available = int(gpu.memory_bytes * options.memory_fraction)
    made = plan_memory(
        cfg,
        device_bytes=available,
        devices=count,
        bandwidth=gpu.bandwidth,
        **_plan_arguments(cfg, stored, options, count),
    )
    return f"{count} x {gpu.name}", made


def _plan_on_local_devices(cfg: Config, stored: Storage, options: PlanOptions) -> tuple[str, MemoryPlan]:
    from glm_jax.memory import plan_memory_on_devices
    from glm_jax.sharding import make_mesh

    mesh = make_mesh(1 if options.mesh is None else options.mesh)
    kind = mesh.devices.flat[0].device_kind
    if kind == "cpu" and options.cache_dtype is None and options.dtype == "bfloat16":
        print(
            "note: on CPUs LLM.load keeps the cache in float32: add --cache-dtype float32 to plan that", file=sys.stderr
        )
    return f"{mesh.size} x {kind}", plan_memory_on_devices(
        cfg, mesh, **_plan_arguments(cfg, stored, options, mesh.size)
    )


def _plan_arguments(cfg: Config, stored: Storage, options: PlanOptions, devices: int) -> dict[str, Any]:
    from glm_jax.sharding import get_sharding_preset

    names = ("dtype", "cache_dtype", "context", "sequences", "mtp")
    rules = get_sharding_preset("latency" if devices > 1 else "replicated")
    return {
        "rules": rules,
        "storage": _quantized_storage(cfg, options.quantize, rules, devices) or stored,
        **{name: getattr(options, name) for name in names},
    }


def _quantized_storage(cfg: Config, quantize: str | None, rules: Rules, devices: int) -> Storage | None:
    from glm_jax.sharding import MESH_AXES
    from glm_jax.weights import QuantRules
    from glm_jax.weights.storage import plan_storage

    quant = QuantRules.resolve(quantize)
    return None if quant is None else plan_storage(cfg, quant, rules, {MESH_AXES[1]: devices})[0]


def _print_plan(model: str, where: str, plan: MemoryPlan) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    dtype = plan.memory_model.placement.dtype
    how = f"quantized, the rest in {dtype}" if plan.memory_model.placement.storage else f"in {dtype}"
    console.print(_weights_table(f"{model}, weights {how}", plan))
    console.print(_device_table(where, plan))
    # Sentences are wrapped by the terminal, so that they can be copied whole.
    console.print("\n".join(_summary_lines(plan)), soft_wrap=True, markup=False)


def _weights_table(title: str, plan: MemoryPlan) -> Table:
    from rich.table import Table

    from glm_jax.memory import MTP_LAYER, format_bytes

    shared = plan.devices > 1
    table = Table("part", title=title, title_justify="left")
    for column in ["parameters", "bytes", *(["on each device"] if shared else [])]:
        table.add_column(column, justify="right")
    rows = [(name, part) for name, part in plan.weight_groups.items() if part.parameters and name != MTP_LAYER]
    whole = sum((part for _, part in rows[1:]), rows[0][1])
    extra = plan.weight_groups[MTP_LAYER]
    for i, (name, part) in enumerate([*rows, ("model", whole), (f"{MTP_LAYER} (MTP)", extra)]):
        cells = [f"{part.parameters:,}", f"{part.nbytes:,}", *([format_bytes(part.device_bytes)] if shared else [])]
        table.add_row(name.replace("_", " "), *cells, end_section=i == len(rows) - 1)
    return table


def _device_table(where: str, plan: MemoryPlan) -> Table:
    from rich.table import Table

    from glm_jax.memory import format_bytes, pluralize

    table = Table("on each device" if plan.devices > 1 else "on the device", title=where, title_justify="left")
    table.add_column("bytes", justify="right")
    layer = " with the prediction layer" if plan.memory_model.mtp and plan.mtp_bytes else ""
    table.add_row(f"weights{layer}", format_bytes(plan.requirement.weights))
    rows = f"{pluralize(plan.sequences, 'sequence')} x {pluralize(plan.context, 'token')}"
    table.add_row(f"latent cache, {rows}", format_bytes(plan.requirement.cache))
    table.add_row("workspace (activations, logits)", format_bytes(plan.requirement.workspace), end_section=True)
    table.add_row("needed", format_bytes(plan.requirement.total))
    table.add_row("available", format_bytes(plan.device_bytes))
    return table


def _summary_lines(plan: MemoryPlan) -> list[str]:
    from glm_jax.memory import MTP_LAYER, format_bytes, pluralize

    context, rows = pluralize(plan.context, "token"), pluralize(plan.sequences, "sequence")
    lines = [
        "fits" if plan.fits else f"does not fit: {plan.oom_message()}",
        f"cache: {plan.cache_bytes_per_token:,} bytes per token",
        f"longest context of one sequence: {pluralize(plan.max_context, 'token')}",
        f"sequences at once of {context}: {plan.max_sequences:,}",
    ]
    if plan.bandwidth and plan.bound_tokens_per_s:
        lines.append(
            f"decoding: at most {plan.bound_tokens_per_s:,.0f} tokens/s for {rows} of {context} (a bound, not a "
            f"measurement: {format_bytes(plan.decode_bytes)} to read per step at {plan.bandwidth / 1e9:,.0f} GB/s)"
        )
    if plan.weight_groups[MTP_LAYER].parameters:
        lines.append(f"on disk, with the prediction layer as published: {plan.parameters_on_disk:,} parameters")
    return lines


if __name__ == "__main__":
    run_and_exit(main)
