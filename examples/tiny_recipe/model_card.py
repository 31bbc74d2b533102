"""The model card and the training curve, rendered from the metrics and the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.tiny_recipe.corpus import LibraryFile

TEMPLATE = Path(__file__).with_name("card_template.md")
METRICS_FILE, CARD_FILE, CURVE_FILE, TASKS_FILE = "metrics.json", "README.md", "training.png", "heldout_chat.jsonl"


def read_log(path: Path) -> list[dict[str, float]]:
    """Reads the records of a run's log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_curve(path: Path, log: Sequence[dict[str, float]]) -> None:
    """Plots the losses and the bits per byte of held-out files over the tokens seen."""
    from matplotlib.figure import Figure  # only this plot needs matplotlib

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("code", "library code"), ("chat", "conversations"), ("draft", "prediction layer")):
        points = [(r["tokens"] / 1e6, r[name]) for r in log if r.get(name)]
        left.plot(*zip(*points, strict=True), label=label, linewidth=1)
    left.set(xlabel="million tokens", ylabel="loss (nats per token)")
    left.legend(fontsize=8)
    points = [(r["tokens"] / 1e6, r["bpb"]) for r in log if "bpb" in r]
    right.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1)
    right.set(xlabel="million tokens", ylabel="bits per byte, held-out slice")
    figure.savefig(path, dpi=90)


def render_card(metrics: dict[str, Any], held_out: Sequence[LibraryFile]) -> str:
    """Renders the Markdown text of the card."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        **metrics,
        kinds=_accuracy_rows(metrics["chat"]["by_kind"]),
        loads=_load_rows(metrics["expert_load"]),
        stages="\n".join(map(_stage_row, metrics["run"]["stages"])),
        files="\n".join(f"{file.sha256}  {file.name}" for file in held_out),
        tasks_file=TASKS_FILE,
        curve_file=CURVE_FILE,
    )


def _accuracy_rows(by_kind: dict[str, float]) -> str:
    cells = [f"{kind.replace('_', ' ')} | {share:.0%}" for kind, share in by_kind.items()]
    half = (len(cells) + 1) // 2
    right = [*cells[half:], *[" | "] * (2 * half - len(cells))]
    return "\n".join(f"| {a} | | {b} |" for a, b in zip(cells[:half], right, strict=True))


def _load_rows(loads: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = [(routers, extreme) for routers in loads.values() for extreme in ("busiest", "idlest")]
    rows = {name: [f"{routers[name][extreme]:.2f}" for routers, extreme in columns] for name in loads["library"]}
    return "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())


def _stage_row(stage: dict[str, Any]) -> str:
    shapes = [f"{stage[source]['count']} × {stage[source]['length']}" for source in ("code", "chat")]
    shares = [f"{stage[name]:.0%}" for name in ("tool_share", "hard_share", "chat_weight")]
    cells = [f"{stage['start']:,}", *shapes, *shares, "yes" if stage["mtp"] else "no"]
    return f"| {' | '.join(cells)} |"
