"""A benchmark report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_jax.bench.profiler import DeviceProfile
from glm_jax.bench.timing import TimingSummary
from pallas_kernels.report_format import format_size, markdown_table

BenchReport = dict[str, Any]
"""A report as JSON has it: the settings, ``machine``, ``loaded``, and a :data:`CaseResult` per case in ``results``."""

CaseResult = dict[str, Any]
"""Result of one case: its batch size and length, the metrics of each backend by name, and how they compare."""

_MAX_OPERATIONS = 12


def bench_report_markdown(report: BenchReport) -> str:
    """Returns the report as a short section: settings and machine, a table of cases, operations on the GPU."""
    sections = [bench_report_heading(report), bench_results_table(report), *_footnotes(report), *_operations(report)]
    return "\n\n".join(sections) + "\n"


def bench_report_heading(report: BenchReport) -> str:
    """Returns the settings, the machine, and the cost of loading each model."""
    machine, bandwidth = report["machine"], report["machine"]["bandwidth"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quantized = f"{report['quantize']} and " if report["quantize"] else ""
    is_decode = report["kind"] == "decode"
    work = f"{report['tokens']} tokens, cache of {report['cache_holds']}" if is_decode else "prompts"
    lines = [
        f"### {report['kind']}: {report['model']}, {quantized}{report['dtype']}, cache in {report['cache_dtype']}",
        f"{work}; {report['repeats']} interleaved repeats, median (min – max); "
        f"{'hand-written kernels' if report['kernels'] else 'without hand-written kernels'}.",
        f"{machine['device']}: {_gpu_state(machine)}{machine['cpu']}, {machine['cores']} cores, load average "
        f"{machine['load_average']:.1f}; {bandwidth['bytes_per_s'] / 1e9:,.1f} GB/s ({bandwidth['of']}). "
        f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}.",
    ]
    for name, stats in report["loaded"].items():
        peak = stats["peak_bytes"]
        memory = "" if peak is None else f", peak of host memory {peak / 1e9:.2f} GB"
        lines.append(f"{name}: {stats['weight_bytes'] / 1e9:.2f} GB of weights in {stats['seconds']:.1f} s{memory}.")
    return "\n\n".join(lines)


def _gpu_state(machine: Mapping[str, Any]) -> str:
    gpu = machine.get("gpu")
    if gpu is None:
        return ""
    return (
        f"driver {gpu['driver_version']}, clocks {gpu['clocks.sm']} of {gpu['clocks.max.sm']} and memory "
        f"{gpu['clocks.mem']}, ECC {gpu['ecc.mode.current']}, power limit {gpu['power.limit']}; "
    )


def bench_results_table(report: BenchReport) -> str:
    """Returns a Markdown table with one line per case."""
    is_decode = report["kind"] == "decode"
    columns = ["batch", "context" if is_decode else "length"]
    if is_decode:
        columns += ["ms per token", "tokens/s of one row", "tokens/s of all rows", "GB read per step"]
        columns += ["GB/s", "of measured bandwidth", "of bound", "launches per token"]
    else:
        columns += ["ms", "tokens/s of all rows"]
    for peer in report["peers"]:
        columns += [f"{peer}: {'ms per token' if is_decode else 'ms'}", "times as long", "same tokens"]
    columns += ["compile s"]
    return markdown_table(columns, [_case_cells(report, result, len(columns)) for result in report["results"]])


def _case_cells(report: BenchReport, result: CaseResult, num_columns: int) -> list[str]:
    is_decode = report["kind"] == "decode"
    cells = [f"{result['batch']:,}", format_size(case_length(result))]
    if "glm_jax" not in result:
        cells += ["skipped" if "skipped" in result else "failed"]
        return cells + [""] * (num_columns - len(cells))
    own, time_key = result["glm_jax"], "ms_per_token_of_one_row" if is_decode else "ms_for_all_prompts"
    cells += [_spread(own[time_key], 3)]
    cells += [f"{own['tokens_per_s_of_one_row']['median']:,.1f}"] if is_decode else []
    cells += [_spread(own["tokens_per_s_of_all_rows"], 1)]
    cells += _bandwidth_cells(result) if is_decode else []
    for peer in report["peers"]:
        cells += [_spread(result[peer][time_key], 3), f"**{_spread(result['ratio'][peer], 2)}**"]
        same = result["same_tokens"].get(peer)
        cells += ["" if same is None else f"{same:.0%}"]
    return [*cells, f"{own['compile_s']:.1f}"]


def case_length(result: CaseResult) -> int:
    """Returns the tokens of a case: the context of decoding, or the length of the prompts."""
    return result["context" if "context" in result else "length"]


def _bandwidth_cells(result: CaseResult) -> list[str]:
    read = result["read"]
    approximately = "" if result["batch"] == 1 else "~"
    cells = [f"{approximately}{read['bytes_per_step'] / 1e9:.3f}", f"{approximately}{read['bytes_per_s'] / 1e9:,.1f}"]
    cells += [f"{approximately}{read['of_measured_bandwidth']:.0%}"]
    cells += [f"{approximately}{read['of_bound']:.0%}" if "of_bound" in read else ""]
    return [*cells, str(result["compiled"]["launches_per_token"]) if "compiled" in result else ""]


def _spread(summary: TimingSummary, digits: int) -> str:
    return f"{summary['median']:,.{digits}f} ({summary['min']:,.{digits}f} – {summary['max']:,.{digits}f})"


def _footnotes(report: BenchReport) -> list[str]:
    """Returns the reasons for cases without a result, and the meaning of "~"."""
    kind = "context" if report["kind"] == "decode" else "length"
    lines = [
        f"* batch {result['batch']:,}, {kind} {format_size(result[kind])}: {outcome}, {result[outcome]}"
        for result in report["results"]
        for outcome in ("skipped", "failed")
        if outcome in result
    ]
    if any(result["batch"] > 1 and "read" in result for result in report["results"]):
        lines.append(
            "* ~: with as many active experts as uniform routing would choose; the actual ones are not counted"
        )
    return ["\n".join(lines)] if lines else []


def _operations(report: BenchReport) -> list[str]:
    """Returns a table of the longest operations for every case that was profiled."""
    work = "a step" if report["kind"] == "decode" else "all prompts"
    tables = []
    for result in (result for result in report["results"] if "profiled" in result):
        profile: DeviceProfile = result["profiled"]
        rows = [
            [
                operation["name"],
                f"{operation['count']:,.1f}",
                f"{operation['us']:,.1f}",
                f"{operation['us'] / profile['us']:.0%}",
            ]
            for operation in profile["operations"][:_MAX_OPERATIONS]
        ]
        case = f"Batch {result['batch']:,}, {format_size(case_length(result))} tokens"
        title = f"{case}: {profile['us']:,.0f} µs on the device for {work}, by JAX's profiler"
        tables.append(f"{title}\n\n{markdown_table(['operation', 'times', 'µs', 'share'], rows, text_columns=1)}")
    return tables
