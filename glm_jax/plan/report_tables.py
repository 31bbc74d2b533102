"""A memory plan as tables and sentences on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from glm_jax.memory import MTP_LAYER, MemoryPlan, format_bytes, pluralize


def print_plan(model: str, location: str, plan: MemoryPlan) -> None:
    """Prints the tables and sentences of a plan.

    Args:
        model: Model as the user named it.
        location: Devices in words, such as "2 x h100".
        plan: The plan.
    """
    console = Console(highlight=False)
    placement = plan.memory_model.placement
    weights = f"quantized, the rest in {placement.dtype}" if placement.storage else f"in {placement.dtype}"
    console.print(_weights_table(f"{model}, weights {weights}", plan))
    console.print(_device_table(location, plan))
    # The terminal wraps the sentences itself, so that each can be copied as one line.
    console.print("\n".join(_summary_lines(plan)), soft_wrap=True, markup=False)


def _weights_table(title: str, plan: MemoryPlan) -> Table:
    is_split = plan.devices > 1
    table = Table("part", title=title, title_justify="left")
    for column in ["parameters", "bytes", *(["on each device"] if is_split else [])]:
        table.add_column(column, justify="right")
    groups = [(name, group) for name, group in plan.weight_groups.items() if group.parameters and name != MTP_LAYER]
    total = sum((group for _, group in groups[1:]), groups[0][1])
    lines = [*groups, ("model", total), (f"{MTP_LAYER} (MTP)", plan.weight_groups[MTP_LAYER])]
    for i, (name, group) in enumerate(lines):
        cells = [f"{group.parameters:,}", f"{group.nbytes:,}"]
        cells += [format_bytes(group.device_bytes)] if is_split else []
        table.add_row(name.replace("_", " "), *cells, end_section=i == len(groups) - 1)
    return table


def _device_table(location: str, plan: MemoryPlan) -> Table:
    table = Table("on each device" if plan.devices > 1 else "on the device", title=location, title_justify="left")
    table.add_column("bytes", justify="right")
    mtp = " with the prediction layer" if plan.memory_model.mtp and plan.mtp_bytes else ""
    table.add_row(f"weights{mtp}", format_bytes(plan.requirement.weights))
    cached = f"{pluralize(plan.sequences, 'sequence')} x {pluralize(plan.context, 'token')}"
    table.add_row(f"latent cache, {cached}", format_bytes(plan.requirement.cache))
    table.add_row("workspace (activations, logits)", format_bytes(plan.requirement.workspace), end_section=True)
    table.add_row("needed", format_bytes(plan.requirement.total))
    table.add_row("available", format_bytes(plan.device_bytes))
    return table


def _summary_lines(plan: MemoryPlan) -> list[str]:
    context, sequences = pluralize(plan.context, "token"), pluralize(plan.sequences, "sequence")
    lines = [
        "fits" if plan.fits else f"does not fit: {plan.oom_message()}",
        f"cache: {plan.cache_bytes_per_token:,} bytes per token",
        f"longest context of one sequence: {pluralize(plan.max_context, 'token')}",
        f"concurrent sequences of {context}: {plan.max_sequences:,}",
    ]
    if plan.bandwidth and plan.bound_tokens_per_s:
        lines.append(
            f"decoding: at most {plan.bound_tokens_per_s:,.0f} tokens/s for {sequences} of {context} (a bound, not a "
            f"measurement: {format_bytes(plan.decode_bytes)} to read per step at {plan.bandwidth / 1e9:,.0f} GB/s)"
        )
    if plan.weight_groups[MTP_LAYER].parameters:
        lines.append(f"on disk, with the prediction layer as published: {plan.parameters_on_disk:,} parameters")
    return lines
