"""A report as JSON and as a Markdown table."""

from __future__ import annotations

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """The report as a short Markdown section: what was run on what, and a table."""
    return f"{_heading(report)}\n\n{table(report)}\n"


def table(report: dict[str, Any]) -> str:
    """The results as a Markdown table; tokens per second are medians with the least and the greatest."""
    peer = report["peer"]
    columns = ["batch", "length" if report["kind"] == "prefill" else "context", "glm_jax tokens/s"]
    if peer:
        columns += [f"{peer} tokens/s", "ratio", "same tokens"]
    columns += ["compile s"]
    if report["kind"] == "decode":
        columns += ["weights read GB/s (of measured)"]
    rows = [_row(report, result) for result in report["results"]]
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quantised = f"{report['quantize']} and " if report.get("quantize") else ""
    work = f"{report['tokens']} tokens" if report["kind"] == "decode" else "prompts"
    where = f"{machine['device']}: {machine['cpu']}, {machine['cores']} cores"
    speed = f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s read, load average {machine['load_average']:.1f}"
    lines = [
        f"### {report['kind']}: {report['model']}, {quantised}{report['dtype']}",
        "",
        f"{work}, {report['repeats']} repeats in turn, median (least – greatest).",
        f"{where}; {speed}. {versions}; commit {machine['commit'] or 'unknown'}.",
    ]
    for name, loaded in report["loaded"].items():
        peak = loaded["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / 1e9:.2f} GB"
        lines += [
            "",
            f"{name}: {loaded['weight_bytes'] / 1e9:.2f} GB of weights loaded in {loaded['seconds']:.1f} s{memory}.",
        ]
    return "\n".join(lines)


def _row(report: dict[str, Any], result: dict[str, Any]) -> list[str]:
    cells = [str(result["batch"]), str(result.get("length", report.get("context")))]
    cells += [_rate(result["glm_jax"])]
    if report["peer"]:
        ratio = result["ratio"]
        cells += [
            _rate(result[report["peer"]]),
            f"**{ratio['median']:.2f}** ({ratio['min']:.2f} – {ratio['max']:.2f})",
            f"{result['same_tokens']:.0%}",
        ]
    cells += [f"{result['glm_jax']['compile_s']:.1f}"]
    if report["kind"] == "decode":
        read = result.get("weights_read_bytes_per_s")
        share = 0.0 if read is None else read / report["machine"]["read_bytes_per_s"]
        cells += ["" if read is None else f"{read / 1e9:.1f} ({share:.0%})"]
    return cells


def _rate(side: dict[str, Any]) -> str:
    rate = side["tokens_per_s"]
    return f"{rate['median']:,.2f} ({rate['min']:,.2f} – {rate['max']:,.2f})"
