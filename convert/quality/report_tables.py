"""Renders a quality report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pallas_kernels.report_format import markdown_table


def render_quality_report(report: dict[str, Any]) -> str:
    """Renders the report of ``python -m convert.verify``: a heading, and a table for each kind of measurement."""
    model = report["model"]
    quantized = f", quantized to {model['quantize']} by {model['method']}" if model["quantize"] else ""
    heading = f"### {model['name']}{quantized}, against {report['source']['name']}"
    sections = [heading, _sizes_table(report), _errors_by_kind_table(report)]
    if "text" in report:
        sections.append(_text_section(report))
    if "chat" in report:
        sections.append(_chat_section(report["chat"]))
    return "\n\n".join([*sections, _errors_by_layer_section(report)]) + "\n"


def labeled_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose first column holds labels; the others are right-aligned."""
    return markdown_table(header, rows, text_columns=1)


def format_relative_error(value: float | None) -> str:
    """Formats a relative error in per cent; ``None`` is "undefined"."""
    return "undefined" if value is None else f"{value:.3%}" if value else "0"


def format_nats(value: float) -> str:
    """Formats a divergence in nats with three significant digits."""
    return f"{value:.3g}" if value else "0"


def _sizes_table(report: dict[str, Any]) -> str:
    source, model = report["source"]["size"], report["model"]["size"]
    rows: list[list[str]] = []
    for key, title in (("main", "weights"), ("mtp", "prediction layer")):
        sizes = [side[key]["bytes"] for side in (source, model)]
        if any(sizes):
            ratio = f"{sizes[1] / sizes[0]:.3f}" if all(sizes) else ""
            rows.append([f"bytes, {title}", *(f"{n:,}" for n in sizes), ratio])
    bits = [side["bits_per_weight"] for side in (source, model)]
    rows.append(["bits per weight", *(f"{n:.2f}" for n in bits), f"{bits[1] / bits[0]:.3f}"])
    return labeled_table(["as loaded, unquantized weights in bfloat16", "source", "model", "ratio"], rows)


def _errors_by_kind_table(report: dict[str, Any]) -> str:
    errors = report["weights"]["by_kind"]
    return labeled_table(
        ["weights", "relative error"], [[kind, format_relative_error(value)] for kind, value in errors.items()]
    )


def _errors_by_layer_section(report: dict[str, Any]) -> str:
    kinds = ["all", *report["weights"]["by_kind"]]
    rows = [
        [layer, *(format_relative_error(errors[kind]) if kind in errors else "" for kind in kinds)]
        for layer, errors in report["weights"]["by_layer"].items()
    ]
    return "Relative error by layer:\n\n" + labeled_table(["layer", *kinds], rows)


def _text_section(report: dict[str, Any]) -> str:
    text, model = report["text"], report["model"]
    kl, top, perplexity = text["kl"], text["top1"], text["perplexity"]
    sure = "no position" if top["sure_agreement"] is None else f"{top['sure_agreement']:.3%}"
    low, high = kl["mean_95"]
    header = [f"{text['tokens']:,} tokens, cache in {model['cache_dtype']}", ""]
    rows = [
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
    return f"Windows of {text['window']:,} tokens, activations in {report['dtype']}.\n\n{labeled_table(header, rows)}"


def _chat_section(chat: dict[str, Any]) -> str:
    source, model = chat["reference"], chat["model"]
    rows = [[f"all {source['tasks']:,}", f"{source['exact_match']:.2%}", f"{model['exact_match']:.2%}"]]
    rows += [[kind, f"{share:.1%}", f"{model['by_kind'][kind]:.1%}"] for kind, share in source["by_kind"].items()]
    if source["well_formed_calls"] is not None:
        calls = [f"{side['well_formed_calls']:.1%}" for side in (source, model)]
        rows.append(["well-formed tool calls, of those required", *calls])
    low, high = chat["difference_95"]
    difference = f"Difference {chat['difference']:+.2%} (95 % interval {low:+.2%} to {high:+.2%})"
    if chat["ratio"] is not None:
        low, high = chat["ratio_95"]
        difference += f", ratio {chat['ratio']:.4f} ({low:.4f} to {high:.4f})"
    table = labeled_table(["chat tasks with exactly correct answers", "source", "model"], rows)
    return f"{table}\n\n{difference}; the bootstrap resamples tasks, the same ones for both models."
