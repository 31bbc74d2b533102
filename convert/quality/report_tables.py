"""A quality report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = list[list[str]]


def render_quality_report(report: dict[str, Any]) -> str:
    """The report of ``python -m convert.verify``: a heading and a table for each thing that was measured."""
    model = report["model"]
    made = f", quantized to {model['quantize']} by {model['method']}" if model["quantize"] else ""
    parts = [f"### {model['name']}{made}, against {report['source']['name']}", _sizes(report), _errors_by_kind(report)]
    if "text" in report:
        parts.append(_text(report))
    if "chat" in report:
        parts.append(_chat(report["chat"]))
    return "\n\n".join([*parts, _errors_by_layer(report)]) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, the first column left-aligned and the others right."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def format_relative_error(value: float | None) -> str:
    """A relative error in per cent."""
    return "undefined" if value is None else f"{value:.3%}" if value else "0"


def format_nats(value: float) -> str:
    """A divergence with three digits."""
    return f"{value:.3g}" if value else "0"


def _sizes(report: dict[str, Any]) -> str:
    source, model = report["source"]["size"], report["model"]["size"]
    rows: Rows = [["as loaded, unquantized parts in bfloat16", "source", "model", "ratio"]]
    for part, words in (("main", "weights"), ("mtp", "prediction layer")):
        held = [side[part]["bytes"] for side in (source, model)]
        if any(held):
            ratio = f"{held[1] / held[0]:.3f}" if all(held) else ""
            rows.append([f"bytes, {words}", *(f"{n:,}" for n in held), ratio])
    bits = [side["bits_per_weight"] for side in (source, model)]
    return markdown_table([*rows, ["bits per weight", *(f"{n:.2f}" for n in bits), f"{bits[1] / bits[0]:.3f}"]])


def _errors_by_kind(report: dict[str, Any]) -> str:
    errors = report["weights"]["by_kind"]
    return markdown_table(
        [["weights", "relative error"], *([kind, format_relative_error(value)] for kind, value in errors.items())]
    )


def _errors_by_layer(report: dict[str, Any]) -> str:
    kinds = list(report["weights"]["by_kind"])
    rows = [["part", "all", *kinds]]
    for part, errors in report["weights"]["by_layer"].items():
        rows.append(
            [
                part,
                format_relative_error(errors["all"]),
                *(format_relative_error(errors[k]) if k in errors else "" for k in kinds),
            ]
        )
    return "Relative error by part:\n\n" + markdown_table(rows)


def _text(report: dict[str, Any]) -> str:
    text, model = report["text"], report["model"]
    kl, top, perplexity = text["kl"], text["top1"], text["perplexity"]
    sure = "no position" if top["sure_agreement"] is None else f"{top['sure_agreement']:.3%}"
    low, high = kl["mean_95"]
    rows = [
        [f"{text['tokens']:,} tokens, cache in {model['cache_dtype']}", ""],
        ["KL(source, model), mean", f"{format_nats(kl['mean'])} nats"],
        ["95 % interval of the mean", f"{format_nats(low)} – {format_nats(high)}"],
        ["median", format_nats(kl["median"])],
        ["99th percentile", format_nats(kl["p99"])],
        ["largest", format_nats(kl["max"])],
        ["perplexity of the source", f"{perplexity['reference']:.4f}"],
        ["perplexity of the model", f"{perplexity['model']:.4f}"],
        ["same most likely token", f"{top['agreement']:.3%}"],
        [f"the same, at {top['sure_positions']:,} positions with a lead over {top['sure_nats']} nats", sure],
    ]
    return f"Windows of {text['window']:,} tokens, activations in {report['dtype']}.\n\n{markdown_table(rows)}"


def _chat(chat: dict[str, Any]) -> str:
    ours, theirs = chat["reference"], chat["model"]
    rows = [["chat tasks answered to the letter", "source", "model"]]
    rows.append([f"all {ours['tasks']:,}", f"{ours['exact_match']:.2%}", f"{theirs['exact_match']:.2%}"])
    rows += [[kind, f"{share:.1%}", f"{theirs['by_kind'][kind]:.1%}"] for kind, share in ours["by_kind"].items()]
    if ours["well_formed_calls"] is not None:
        calls = [f"{side['well_formed_calls']:.1%}" for side in (ours, theirs)]
        rows.append(["well-formed tool calls, of those due", *calls])
    low, high = chat["difference_95"]
    found = f"Difference {chat['difference']:+.2%} (95 % interval {low:+.2%} to {high:+.2%})"
    if chat["ratio"] is not None:
        low, high = chat["ratio_95"]
        found += f", ratio {chat['ratio']:.4f} ({low:.4f} to {high:.4f})"
    return f"{markdown_table(rows)}\n\n{found}; tasks drawn anew for both models together."
