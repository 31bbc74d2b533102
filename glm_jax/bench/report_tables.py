"""A report as Markdown tables."""

from __future__ import annotations

from typing import Any

from pallas_kernels import report_format
from pallas_kernels.report_format import format_size

BenchReport = dict[str, Any]
_MAX_OPERATIONS = 12


def bench_report_markdown(report: BenchReport) -> str:
    """The report as a short Markdown section: what was run on what, a table of cases, what the device ran."""
    parts = [bench_report_heading(report), bench_results_table(report), *_footnotes(report), *_operations(report)]
    return "\n\n".join(parts) + "\n"


def bench_report_heading(report: BenchReport) -> str:
    """What was run, on what."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quantized = f"{report['quantize']} and " if report["quantize"] else ""
    decoding = report["kind"] == "decode"
    work = f"{report['tokens']} tokens, cache of {report['cache_holds']}" if decoding else "prompts"
    speed = f"{machine['bandwidth']['bytes_per_s'] / 1e9:,.1f} GB/s ({machine['bandwidth']['of']})"
    lines = [
        f"### {report['kind']}: {report['model']}, {quantized}{report['dtype']}, cache in {report['cache_dtype']}",
        f"{work}; {report['repeats']} repeats in turn, median (least – greatest); "
        f"{'hand-written kernels' if report['kernels'] else 'without hand-written kernels'}.",
        f"{machine['device']}: {_gpu(machine)}{machine['cpu']}, {machine['cores']} cores, load average "
        f"{machine['load_average']:.1f}; {speed}. Python {machine['python']}, {versions}; commit "
        f"{machine['commit'] or 'unknown'}.",
    ]
    for name, loaded in report["loaded"].items():
        peak = loaded["peak_bytes"]
        memory = "" if peak is None else f", peak of host memory {peak / 1e9:.2f} GB"
        lines.append(f"{name}: {loaded['weight_bytes'] / 1e9:.2f} GB of weights in {loaded['seconds']:.1f} s{memory}.")
    return "\n\n".join(lines)


def _gpu(machine: BenchReport) -> str:
    gpu = machine.get("gpu")
    if gpu is None:
        return ""
    return (
        f"driver {gpu['driver_version']}, clocks {gpu['clocks.sm']} of {gpu['clocks.max.sm']} and memory "
        f"{gpu['clocks.mem']}, ECC {gpu['ecc.mode.current']}, power limit {gpu['power.limit']}; "
    )


def bench_results_table(report: BenchReport) -> str:
    """The cases as a Markdown table."""
    decoding, peers = report["kind"] == "decode", report["peers"]
    columns = ["batch", "context" if decoding else "length"]
    if decoding:
        columns += ["ms per token", "tokens/s of one row", "tokens/s of all rows", "GB read per step"]
        columns += ["GB/s", "of measured bandwidth", "of bound", "launches per token"]
    else:
        columns += ["ms", "tokens/s of all rows"]
    for peer in peers:
        columns += [f"{peer}: {'ms per token' if decoding else 'ms'}", "times as long", "same tokens"]
    columns += ["compile s"]
    return report_format.markdown_table(columns, [_row(report, result, len(columns)) for result in report["results"]])


def _row(report: BenchReport, result: BenchReport, width: int) -> list[str]:
    decoding = report["kind"] == "decode"
    cells = [f"{result['batch']:,}", format_size(result["context" if decoding else "length"])]
    if "glm_jax" not in result:
        cells += ["skipped" if "skipped" in result else "failed"]
        return cells + [""] * (width - len(cells))
    ours, time = result["glm_jax"], "ms_per_token_of_one_row" if decoding else "ms_for_all_prompts"
    cells += [_spread(ours[time], 3)]
    if decoding:
        cells += [f"{ours['tokens_per_s_of_one_row']['median']:,.1f}", _spread(ours["tokens_per_s_of_all_rows"], 1)]
        cells += _read(result)
    else:
        cells += [_spread(ours["tokens_per_s_of_all_rows"], 1)]
    for peer in report["peers"]:
        cells += [_spread(result[peer][time], 3), f"**{_spread(result['ratio'][peer], 2)}**"]
        same = result["same_tokens"].get(peer)
        cells += ["" if same is None else f"{same:.0%}"]
    return [*cells, f"{ours['compile_s']:.1f}"]


def _read(result: BenchReport) -> list[str]:
    read = result["read"]
    about = "" if result["batch"] == 1 else "~"
    cells = [f"{about}{read['bytes_per_step'] / 1e9:.3f}", f"{about}{read['bytes_per_s'] / 1e9:,.1f}"]
    cells += [f"{about}{read['of_measured_bandwidth']:.0%}"]
    cells += [f"{about}{read['of_bound']:.0%}" if "of_bound" in read else ""]
    return [*cells, str(result["compiled"]["launches_per_token"]) if "compiled" in result else ""]


def _spread(values: BenchReport, digits: int) -> str:
    return f"{values['median']:,.{digits}f} ({values['min']:,.{digits}f} – {values['max']:,.{digits}f})"


def _footnotes(report: BenchReport) -> list[str]:
    """What did not run, and what a number with a wave before it is."""
    kind = "context" if report["kind"] == "decode" else "length"
    lines = [
        f"* batch {result['batch']:,}, {kind} {format_size(result[kind])}: {word}, {result[word]}"
        for result in report["results"]
        for word in ("skipped", "failed")
        if word in result
    ]
    if any(result["batch"] > 1 and "read" in result for result in report["results"]):
        lines.append("* ~: with as many experts as uniform routing would choose; those chosen were not counted")
    return ["\n".join(lines)] if lines else []


def _operations(report: BenchReport) -> list[str]:
    """Of every case that was profiled, what took longest."""
    found = []
    for result in report["results"]:
        if "profiled" not in result:
            continue
        ran, length = result["profiled"], result["context" if "context" in result else "length"]
        rows = [
            [row["name"], f"{row['count']:,.1f}", f"{row['us']:,.1f}", f"{row['us'] / ran['us']:.0%}"]
            for row in ran["operations"][:_MAX_OPERATIONS]
        ]
        of = "a step" if report["kind"] == "decode" else "all prompts"
        where = f"Batch {result['batch']:,}, {format_size(length)} tokens"
        title = f"{where}: {ran['us']:,.0f} µs of the device for {of}, by JAX's profiler"
        found.append(
            f"{title}\n\n{report_format.markdown_table(['operation', 'times', 'µs', 'share'], rows, text_columns=1)}"
        )
    return found
