"""``python -m pallas_kernels.bench``: time and bandwidth of every kernel at the real model's shapes, on this GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import LaunchError, is_interpreted, kernels_available, timing
from pallas_kernels.machine_info import describe_machine, slugify
from pallas_kernels.report_format import markdown_table, parse_sizes, write_report
from pallas_kernels.specs import SPEC_BUILDERS, KernelSpec, Sweep, list_specs
from pallas_kernels.tiles import BITS_PER_QVALUE

JsonReport = dict[str, Any]
BENCH_DESCRIPTION = """\
Times the kernels of a decode step and of prompts at GLM-4.7-Flash's shapes on this GPU. Each runs many times in one
CUDA graph, with other weights each time, so that no cache serves them; cases too small for that are marked. GB/s count
the bytes that a call must read and write, and are compared with a plain copy measured in the same run.

Examples:
  python -m pallas_kernels.bench --ops gate_up,down --batch 1,8 --kinds int4
  python -m pallas_kernels.bench --ops attend --batch 1 --context 8k,128k --caches int8
  python -m pallas_kernels.bench --short --out docs/benchmarks
"""
# The most informative cases of a minute or two, in this order: experts in 4 bits, the other matrices in 8.
_SHORT_SWEEPS: tuple[tuple[tuple[str, ...], Sweep], ...] = (
    (("gate_up", "down", "head"), Sweep(batch_sizes=(1,), weight_kinds=("int4",))),
    (("attend",), Sweep(batch_sizes=(1,), context_lengths=(1024, 32_768), cache_kinds=("bfloat16", "int8"))),
    (("queries", "values", "linear"), Sweep(batch_sizes=(1,), weight_kinds=("int8",))),
    (("gate_up", "down", "head"), Sweep(batch_sizes=(32,), weight_kinds=("int4",))),
    (("attend",), Sweep(batch_sizes=(32,), context_lengths=(8192,), cache_kinds=("bfloat16",))),
    (("matmul", "gated", "flash"), Sweep(weight_kinds=("int4",), prefill_lengths=(2048,))),
    (("queries", "values", "linear"), Sweep(batch_sizes=(1,), weight_kinds=("int4",))),
)


def name_list_parser(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns a parser of names separated by commas, which accepts only known names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
        return names

    return parse


def parse_size_list(text: str) -> tuple[int, ...]:
    """Parses sizes such as ``1,8k`` for argparse."""
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select specifications."""
    defaults = Sweep()
    caches = ("bfloat16", "float32", "int8", "fp8")
    parser.add_argument(
        "--ops",
        type=name_list_parser(tuple(SPEC_BUILDERS)),
        default=(),
        help=f"operations, of {', '.join(SPEC_BUILDERS)}; all by default",
    )
    parser.add_argument("--match", default="", help="only cases whose names contain this, such as o/int4/m1")
    parser.add_argument(
        "--batch", type=parse_size_list, default=defaults.batch_sizes, help="rows, one case each: 1,8,32,64"
    )
    parser.add_argument(
        "--kinds",
        type=name_list_parser(tuple(BITS_PER_QVALUE)),
        default=defaults.weight_kinds,
        help="storages of weights: int4,int8",
    )
    parser.add_argument(
        "--context", type=parse_size_list, default=defaults.context_lengths, help="cached rows, such as 1k,8k,32k"
    )
    parser.add_argument(
        "--caches", type=name_list_parser(caches), default=defaults.cache_kinds, help="storages of the cache: int8,fp8"
    )


def select_specs(options: argparse.Namespace) -> list[KernelSpec]:
    """Returns the specifications that the options select."""
    sweep = Sweep(
        batch_sizes=options.batch,
        weight_kinds=options.kinds,
        context_lengths=options.context,
        cache_kinds=options.caches,
    )
    if not getattr(options, "short", False):
        return list_specs(sweep, options.ops, options.match)
    short = [spec for ops, short_sweep in _SHORT_SWEEPS for spec in list_specs(short_sweep, ops, options.match)]
    return [spec for spec in short if not options.ops or spec.op in options.ops]


def build_bench_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=BENCH_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sweep_options(parser)
    parser.add_argument("--short", action="store_true", help="only the most informative cases, in two minutes")
    parser.add_argument("--out", type=Path, help="write the report into this folder, as JSON and as Markdown")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = build_bench_parser().parse_args(args)
    if problem := unsupported_reason(options.out):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    report: JsonReport = {
        "kind": "kernels",
        "machine": {**describe_machine(), "bandwidth": timing.measure_copy_bandwidth()},
        "results": [],
    }
    for result in run_benchmarks(select_specs(options), report["machine"]["bandwidth"]):
        report["results"].append(result)
        print(format_result(result), file=sys.stderr, flush=True)
        if options.out:
            name = f"{slugify(report['machine']['device'])}-kernels"
            write_report(options.out / f"{name}.json", report)
            write_report(options.out / f"{name}.md", render_kernel_report(report))
    print(render_kernel_report(report))
    return 1 if any("failed" in result for result in report["results"]) else 0


def unsupported_reason(folder: Path | None) -> str | None:
    """Returns why kernels cannot be timed here or the report cannot be written, or ``None``."""
    if is_interpreted() or jax.default_backend() != "gpu" or not kernels_available():
        return "times are those of a GPU, and JAX and Triton find none here"
    if folder is not None and not folder.is_dir():
        return f"{folder} is not a folder"
    return None


def measure_heuristic_seconds(arrays: timing.SpecArrays) -> float:
    """Returns the seconds of a call with tuned or heuristic block sizes."""
    return timing.measure_seconds_per_call(timing.build_loop(arrays))


def run_benchmarks(
    specs: Sequence[KernelSpec],
    bandwidth: float,
    measure: Callable[[timing.SpecArrays], float] = measure_heuristic_seconds,
) -> Iterator[JsonReport]:
    """Yields one result for each specification; a failure is reported and does not stop the others.

    Args:
        specs: Specifications to time.
        bandwidth: Bytes per second of a copy.
        measure: Returns the seconds of a call.
    """
    for spec in specs:
        header: JsonReport = {"op": spec.op, "case": spec.name}
        try:
            yield header | _benchmark_spec(spec, bandwidth, measure)
        except Exception as error:  # Triton's compiler raises many kinds
            yield header | {"failed": format_error(error)}


def _benchmark_spec(spec: KernelSpec, bandwidth: float, measure: Callable[[timing.SpecArrays], float]) -> JsonReport:
    arrays = timing.make_arrays(spec)
    seconds = measure(arrays)
    speed = arrays.nbytes / seconds
    return {
        "us": seconds * 1e6,
        "bytes": arrays.nbytes,
        "bytes_per_s": speed,
        "of_copy": speed / bandwidth,
        "layers": arrays.layers,
        "cached": arrays.cached,
    }


def format_error(error: Exception) -> str:
    """Formats an error as one line."""
    text = str(error).strip().partition("\n")[0][:200]
    return text if isinstance(error, LaunchError) and text else f"{type(error).__name__}: {text}"


def format_result(result: JsonReport) -> str:
    """Formats a result as one line."""
    name = f"{result['op']}/{result['case']}"
    if "failed" in result:
        return f"{name}: failed, {result['failed']}"
    speed = f"{result['bytes_per_s'] / 1e9:,.0f} GB/s, {result['of_copy']:.0%} of a copy"
    return f"{name}: {result['us']:,.1f} µs, {speed}{', from a cache' if result['cached'] else ''}"


def render_kernel_report(report: JsonReport) -> str:
    """Formats a report as a Markdown section."""
    machine = report["machine"]
    gpu = machine.get("gpu", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = [
        machine["device"],
        *(f"{key} {gpu[key]}" for key in ("driver_version", "clocks.sm", "clocks.mem") if key in gpu),
    ]
    columns = ["operation", "case", "µs", "GB/s", "of a copy"]
    return "\n\n".join(
        [
            "### kernels",
            f"{', '.join(facts)}; a copy reads and writes {machine['bandwidth'] / 1e9:,.1f} GB/s. Python "
            f"{machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}.",
            markdown_table(columns, [_table_row(result) for result in report["results"]], text_columns=2) + "\n",
        ]
    )


def _table_row(result: JsonReport) -> list[str]:
    cells = [result["op"], result["case"]]
    if "failed" in result:
        return [*cells, "failed", "", ""]
    share = f"{result['of_copy']:.0%}{' (from a cache)' if result['cached'] else ''}"
    return [*cells, f"{result['us']:,.2f}", f"{result['bytes_per_s'] / 1e9:,.1f}", share]


if __name__ == "__main__":
    sys.exit(main())
