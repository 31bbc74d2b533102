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

from glm_jax.cli.common import OK, finish, set_memory_fraction
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
class Options:
    """Options of the command."""

    model: str = "tiny"
    """Folder (Hugging Face or converted), hub id, "tiny", or "synthetic:flash?layers=4"."""
    gpu: str | None = None
    """A card, or several: h100, b200x4. The device at hand unless given."""
    mesh: int | None = None
    """Number of the devices at hand to split the model over."""
    quantize: str | None = None
    """int4, int4-small, int4-experts or int8: plan the weights quantised so."""
    context: int | None = None
    """Tokens per sequence, prompt and completion together; the longest that fits unless given."""
    sequences: int = 1
    """Sequences at once (a batch is padded to a power of two: give that number)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights that are not quantised."""
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
    options = tyro.cli(Options, prog="python -m glm_jax.plan", description=DESCRIPTION, args=args)
    set_memory_fraction(options.memory_fraction)
    # Asking a GPU for its size should not take its memory from others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cfg, stored = read_model(options.model)
    where, plan = _plan(cfg, stored, options)
    compiled = _compiled(cfg, plan, options) if options.compile else {}
    if options.json:
        print(json.dumps({"model": options.model, "on": where, **plan.to_json(), **compiled}))
    else:
        _show(options.model, where, plan)
        if compiled:
            print(_compiled_sentence(compiled))
    return OK


def _compiled(cfg: Config, plan: MemoryPlan, options: Options) -> dict[str, Any]:
    """What the generation loop becomes on the card."""
    from glm_jax.memory import find_gpus
    from pallas_kernels import aot

    if options.gpu is None:
        raise MemoryPlanError(f"--compile is for a card by name: add --gpu, one of {', '.join(aot.cards())}")
    if options.dtype != "bfloat16":
        raise MemoryPlanError("--compile is of the hand-written kernels, which compute in bfloat16: leave --dtype out")
    gpu, count = find_gpus(options.gpu)
    argument = {
        "gpu": gpu.name,
        "devices": count,
        "config": dataclasses.asdict(cfg),
        "storage": plan.setup.placement.storage.to_json(),
        "batch": plan.sequences,
        "context": plan.context,
        "cache_dtype": plan.setup.placement.cache_dtype,
    }
    print(f"compiling the generation loop for {options.gpu} ...", file=sys.stderr)
    try:
        made = aot.in_child("glm_jax.engine.aot:decode", argument)
    except aot.AotError as error:
        raise MemoryPlanError(str(error)) from None
    names = ("launches_per_token", "graph_pieces", "launches_outside_graphs", "copies_per_token", "temp_bytes")
    return {name: made[name] for name in (*names, "argument_bytes", "fits", "collectives", "kernels")}


def _compiled_sentence(compiled: Mapping[str, Any]) -> str:
    from glm_jax.memory import in_gb
    from glm_jax.model.fused_decode import MOST_TOKENS

    graphs, sums = compiled["graph_pieces"], len(compiled["collectives"])
    pieces = "one CUDA graph" if graphs == 1 and not compiled["launches_outside_graphs"] else f"{graphs} CUDA graphs"
    among = f", {sums} of them exchanges between devices," if sums else ""
    loop = "with the host going round the loop" if sums else "for the whole loop"
    needs = in_gb(compiled["argument_bytes"] + compiled["temp_bytes"])
    made = (
        f"compiled: {compiled['launches_per_token']} kernels per token{among} in {pieces} {loop}; {needs} of weights, "
        f"cache and state on each GPU, {compiled['temp_bytes'] / 1e6:,.1f} MB of them temporaries, which "
        f"{'fits' if compiled['fits'] else 'does not fit'} (kernels are compiled, not run or timed)"
    )
    if "attend_kernel" not in compiled["kernels"]:
        made += f"; more than {MOST_TOKENS} tokens at a time are not for the fused kernels of a decode step"
    return made


def read_model(model: str) -> tuple[Config, Storage]:
    """The architecture behind a source string and how its weights are quantised, from configs and headers alone.

    Raises:
        CheckpointError: if there is none.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """
    from glm_jax.checkpoint.sources.base import storage_of
    from glm_jax.checkpoint.sources.hub import is_hub_id
    from glm_jax.checkpoint.sources.open import TINY, is_gguf, open_source
    from glm_jax.checkpoint.sources.synthetic import PREFIX, SyntheticSpec
    from glm_jax.weights.storage import Storage

    if model.startswith(PREFIX):
        return SyntheticSpec.parse(model).cfg, Storage()
    path = Path(__file__).parent / "tiny" if model == TINY else Path(os.path.expanduser(model))
    if model and path.is_dir() and not is_gguf(path):
        return _in_folder(path)
    if model and path.exists():
        source = open_source(path)
        return source.cfg, storage_of(source)
    if not is_hub_id(model):
        raise CheckpointError(f"there is no folder {model}, and it is not a hub id such as zai-org/GLM-4.7-Flash")
    return _in_folder(_download_config(model))


def _in_folder(folder: Path) -> tuple[Config, Storage]:
    from glm_jax.checkpoint.folder.manifest import is_converted, load_manifest
    from glm_jax.checkpoint.formats.quantization_config import MODELOPT_FILE, SECTIONS
    from glm_jax.checkpoint.sources.base import read_config, storage_of
    from glm_jax.checkpoint.sources.folder import stated_storage
    from glm_jax.checkpoint.sources.open import open_source
    from glm_jax.config import Config
    from glm_jax.weights.storage import Storage

    if is_converted(folder):
        return stated_storage(load_manifest(folder))
    config = read_config(folder)
    quantised = any(config.get(key) for key in SECTIONS) or (folder / MODELOPT_FILE).exists()
    if quantised and any(folder.glob("*.safetensors")):
        source = open_source(folder)
        return source.cfg, storage_of(source)
    if quantised:
        print(
            "note: these weights are quantised, and how can be seen in the files alone: planned as if they were not "
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


def _plan(cfg: Config, stored: Storage, options: Options) -> tuple[str, MemoryPlan]:
    """Where, in words, and the plan."""
    from glm_jax.memory import find_gpus, plan

    if options.gpu is None:
        return _plan_here(cfg, stored, options)
    if options.mesh is not None:
        raise MemoryPlanError(f"--mesh is for the devices at hand: write --gpu {options.gpu}x{options.mesh}")
    gpu, count = find_gpus(options.gpu)
    available = int(gpu.memory_bytes * options.memory_fraction)
    made = plan(
        cfg, device_bytes=available, devices=count, bandwidth=gpu.bandwidth, **_asked(cfg, stored, options, count)
    )
    return f"{count} x {gpu.name}", made


def _plan_here(cfg: Config, stored: Storage, options: Options) -> tuple[str, MemoryPlan]:
    from glm_jax.memory import plan_on
    from glm_jax.sharding import make_mesh

    mesh = make_mesh(1 if options.mesh is None else options.mesh)
    kind = mesh.devices.flat[0].device_kind
    if kind == "cpu" and options.cache_dtype is None and options.dtype == "bfloat16":
        print(
            "note: on CPUs LLM.load keeps the cache in float32: add --cache-dtype float32 to plan that", file=sys.stderr
        )
    return f"{mesh.size} x {kind}", plan_on(cfg, mesh, **_asked(cfg, stored, options, mesh.size))


def _asked(cfg: Config, stored: Storage, options: Options, devices: int) -> dict[str, Any]:
    from glm_jax.sharding import preset

    names = ("dtype", "cache_dtype", "context", "sequences", "mtp")
    rules = preset("latency" if devices > 1 else "replicated")
    return {
        "rules": rules,
        "storage": _storage(cfg, options.quantize, rules, devices) or stored,
        **{name: getattr(options, name) for name in names},
    }


def _storage(cfg: Config, quantize: str | None, rules: Rules, devices: int) -> Storage | None:
    from glm_jax.sharding import MESH_AXES
    from glm_jax.weights import QuantRules
    from glm_jax.weights.storage import plan_storage

    quant = QuantRules.named(quantize)
    return None if quant is None else plan_storage(cfg, quant, rules, {MESH_AXES[1]: devices})[0]


def _show(model: str, where: str, plan: MemoryPlan) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    dtype = plan.setup.placement.dtype
    how = f"quantised, the rest in {dtype}" if plan.setup.placement.storage else f"in {dtype}"
    console.print(_weights_table(f"{model}, weights {how}", plan))
    console.print(_device_table(where, plan))
    # Sentences are wrapped by the terminal, so that they can be copied whole.
    console.print("\n".join(_sentences(plan)), soft_wrap=True, markup=False)


def _weights_table(title: str, plan: MemoryPlan) -> Table:
    from rich.table import Table

    from glm_jax.memory import PREDICTION_LAYER, in_gb

    shared = plan.devices > 1
    table = Table("part", title=title, title_justify="left")
    for column in ["parameters", "bytes", *(["on each device"] if shared else [])]:
        table.add_column(column, justify="right")
    rows = [(name, part) for name, part in plan.parts.items() if part.parameters and name != PREDICTION_LAYER]
    whole = sum((part for _, part in rows[1:]), rows[0][1])
    extra = plan.parts[PREDICTION_LAYER]
    for i, (name, part) in enumerate([*rows, ("model", whole), (f"{PREDICTION_LAYER} (MTP)", extra)]):
        cells = [f"{part.parameters:,}", f"{part.nbytes:,}", *([in_gb(part.device_bytes)] if shared else [])]
        table.add_row(name.replace("_", " "), *cells, end_section=i == len(rows) - 1)
    return table


def _device_table(where: str, plan: MemoryPlan) -> Table:
    from rich.table import Table

    from glm_jax.memory import counted, in_gb

    table = Table("on each device" if plan.devices > 1 else "on the device", title=where, title_justify="left")
    table.add_column("bytes", justify="right")
    layer = " with the prediction layer" if plan.setup.mtp and plan.mtp_bytes else ""
    table.add_row(f"weights{layer}", in_gb(plan.need.weights))
    rows = f"{counted(plan.sequences, 'sequence')} x {counted(plan.context, 'token')}"
    table.add_row(f"latent cache, {rows}", in_gb(plan.need.cache))
    table.add_row("workspace (activations, logits)", in_gb(plan.need.workspace), end_section=True)
    table.add_row("needed", in_gb(plan.need.total))
    table.add_row("available", in_gb(plan.device_bytes))
    return table


def _sentences(plan: MemoryPlan) -> list[str]:
    from glm_jax.memory import PREDICTION_LAYER, counted, in_gb

    context, rows = counted(plan.context, "token"), counted(plan.sequences, "sequence")
    lines = [
        "fits" if plan.fits else f"does not fit: {plan.refusal()}",
        f"cache: {plan.cache_bytes_per_token:,} bytes per token",
        f"longest context of one sequence: {counted(plan.max_context, 'token')}",
        f"sequences at once of {context}: {plan.max_sequences:,}",
    ]
    if plan.bandwidth and plan.bound_tokens_per_s:
        lines.append(
            f"decoding: at most {plan.bound_tokens_per_s:,.0f} tokens/s for {rows} of {context} (a bound, not a "
            f"measurement: {in_gb(plan.decode_bytes)} to read per step at {plan.bandwidth / 1e9:,.0f} GB/s)"
        )
    if plan.parts[PREDICTION_LAYER].parameters:
        lines.append(f"on disk, with the prediction layer as published: {plan.parameters_on_disk:,} parameters")
    return lines


if __name__ == "__main__":
    finish(main)
