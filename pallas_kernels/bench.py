"""``python -m pallas_kernels.bench``: time and bandwidth of every kernel at the real model's shapes, on this card."""

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
Times the kernels of a decode step and of prompts at GLM-4.7-Flash's shapes on the card at hand, many times over in one
CUDA graph and with other weights each time, so that no cache serves them; cases too small for that are marked. GB/s are
of what a call must read and write, beside a plain copy measured in the same run.

Examples:
  python -m pallas_kernels.bench --ops gate_up,down --batch 1,8 --kinds int4
  python -m pallas_kernels.bench --ops attend --batch 1 --context 8k,128k --caches int8
  python -m pallas_kernels.bench --short --out docs/benchmarks
"""
# What tells most in a minute or two, the most telling first: experts in 4 bits, what every token goes through in 8.
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
    """Reads names with commas, each of them one that there is."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
        return found

    return read


def parse_size_list(text: str) -> tuple[int, ...]:
    """Reads ``1,8k``."""
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which cases."""
    plain = Sweep()
    caches = ("bfloat16", "float32", "int8", "fp8")
    parser.add_argument(
        "--ops",
        type=name_list_parser(tuple(SPEC_BUILDERS)),
        default=(),
        help=f"of {', '.join(SPEC_BUILDERS)}; all unless given",
    )
    parser.add_argument("--match", default="", help="only cases whose names contain this, such as o/int4/m1")
    parser.add_argument(
        "--batch", type=parse_size_list, default=plain.batch_sizes, help="rows, one case each: 1,8,32,64"
    )
    parser.add_argument(
        "--kinds",
        type=name_list_parser(tuple(BITS_PER_QVALUE)),
        default=plain.weight_kinds,
        help="storages of weights: int4,int8",
    )
    parser.add_argument(
        "--context", type=parse_size_list, default=plain.context_lengths, help="cached rows, such as 1k,8k,32k"
    )
    parser.add_argument(
        "--caches", type=name_list_parser(caches), default=plain.cache_kinds, help="storages of the cache: int8,fp8"
    )


def select_specs(options: argparse.Namespace) -> list[KernelSpec]:
    """The cases that were asked for."""
    sweep = Sweep(
        batch_sizes=options.batch,
        weight_kinds=options.kinds,
        context_lengths=options.context,
        cache_kinds=options.caches,
    )
    if not getattr(options, "short", False):
        return list_specs(sweep, options.ops, options.match)
    short = [case for ops, each in _SHORT_SWEEPS for case in list_specs(each, ops, options.match)]
    return [case for case in short if not options.ops or case.op in options.ops]


def build_bench_parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=BENCH_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sweep_options(made)
    made.add_argument("--short", action="store_true", help="the few cases that tell most, in two minutes")
    made.add_argument("--out", type=Path, help="write the report into this folder, as JSON and as Markdown")
    return made


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
    """Why nothing can be timed, or kept, here."""
    if is_interpreted() or jax.default_backend() != "gpu" or not kernels_available():
        return "times are those of a GPU, and JAX and Triton find none here"
    if folder is not None and not folder.is_dir():
        return f"{folder} is not a folder"
    return None


def measure_heuristic_seconds(arrays: timing.SpecArrays) -> float:
    """Seconds of a call, with the block sizes that would be chosen."""
    return timing.measure_seconds_per_call(timing.build_loop(arrays))


def run_benchmarks(
    specs: Sequence[KernelSpec],
    bandwidth: float,
    measure: Callable[[timing.SpecArrays], float] = measure_heuristic_seconds,
) -> Iterator[JsonReport]:
    """Each case with the time of a call; what fails is said, and does not stop the others.

    Args:
        specs: cases.
        bandwidth: bytes per second of a copy.
        measure: of one call.
    """
    for case in specs:
        found: JsonReport = {"op": case.op, "case": case.name}
        try:
            yield found | _benchmark_spec(case, bandwidth, measure)
        except Exception as error:  # of Triton's compiler as well
            yield found | {"failed": format_error(error)}


def _benchmark_spec(case: KernelSpec, bandwidth: float, measure: Callable[[timing.SpecArrays], float]) -> JsonReport:
    arrays = timing.make_arrays(case)
    taken = measure(arrays)
    speed = arrays.nbytes / taken
    return {
        "us": taken * 1e6,
        "bytes": arrays.nbytes,
        "bytes_per_s": speed,
        "of_copy": speed / bandwidth,
        "layers": arrays.layers,
        "cached": arrays.cached,
    }


def format_error(error: Exception) -> str:
    """An error in a line."""
    text = str(error).strip().partition("\n")[0][:200]
    return text if isinstance(error, LaunchError) and text else f"{type(error).__name__}: {text}"


def format_result(result: JsonReport) -> str:
    """A result in a line."""
    name = f"{result['op']}/{result['case']}"
    if "failed" in result:
        return f"{name}: failed, {result['failed']}"
    speed = f"{result['bytes_per_s'] / 1e9:,.0f} GB/s, {result['of_copy']:.0%} of a copy"
    return f"{name}: {result['us']:,.1f} µs, {speed}{', from a cache' if result['cached'] else ''}"


def render_kernel_report(report: JsonReport) -> str:
    """The report as a Markdown section."""
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
