"""``python -m pallas_kernels.bench``: time and bandwidth of every kernel at the real model's shapes, on this card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import LaunchError, available, interpreted, timing
from pallas_kernels.machine_info import describe, slug
from pallas_kernels.report_format import sizes, table, write
from pallas_kernels.specs import OPS, Case, Sweep, cases
from pallas_kernels.tiles import BITS

Report = dict[str, Any]
DESCRIPTION = """\
Times the kernels of a decode step and of prompts at GLM-4.7-Flash's shapes on the card at hand, many times over in one
CUDA graph and with other weights each time, so that no cache serves them; cases too small for that are marked. GB/s are
of what a call must read and write, beside a plain copy measured in the same run.

Examples:
  python -m pallas_kernels.bench --ops gate_up,down --batch 1,8 --kinds int4
  python -m pallas_kernels.bench --ops attend --batch 1 --context 8k,128k --caches int8
  python -m pallas_kernels.bench --short --out docs/benchmarks
"""
# What tells most in a minute or two, the most telling first: experts in 4 bits, what every token goes through in 8.
_SHORT: tuple[tuple[tuple[str, ...], Sweep], ...] = (
    (("gate_up", "down", "head"), Sweep(rows=(1,), kinds=("int4",))),
    (("attend",), Sweep(rows=(1,), contexts=(1024, 32_768), caches=("bfloat16", "int8"))),
    (("queries", "values", "linear"), Sweep(rows=(1,), kinds=("int8",))),
    (("gate_up", "down", "head"), Sweep(rows=(32,), kinds=("int4",))),
    (("attend",), Sweep(rows=(32,), contexts=(8192,), caches=("bfloat16",))),
    (("matmul", "gated", "flash"), Sweep(kinds=("int4",), chunks=(2048,))),
    (("queries", "values", "linear"), Sweep(rows=(1,), kinds=("int4",))),
)


def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads names with commas, each of them one that there is."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
        return found

    return read


def numbers(text: str) -> tuple[int, ...]:
    """Reads ``1,8k``."""
    try:
        return sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sweep_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which cases."""
    plain = Sweep()
    caches = ("bfloat16", "float32", "int8", "fp8")
    parser.add_argument("--ops", type=names(tuple(OPS)), default=(), help=f"of {', '.join(OPS)}; all unless given")
    parser.add_argument("--match", default="", help="only cases whose names contain this, such as o/int4/m1")
    parser.add_argument("--batch", type=numbers, default=plain.rows, help="rows, one case each: 1,8,32,64")
    parser.add_argument("--kinds", type=names(tuple(BITS)), default=plain.kinds, help="storages of weights: int4,int8")
    parser.add_argument("--context", type=numbers, default=plain.contexts, help="cached rows, such as 1k,8k,32k")
    parser.add_argument("--caches", type=names(caches), default=plain.caches, help="storages of the cache: int8,fp8")


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    sweep = Sweep(rows=options.batch, kinds=options.kinds, contexts=options.context, caches=options.caches)
    if not getattr(options, "short", False):
        return cases(sweep, options.ops, options.match)
    short = [case for ops, each in _SHORT for case in cases(each, ops, options.match)]
    return [case for case in short if not options.ops or case.op in options.ops]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep_options(made)
    made.add_argument("--short", action="store_true", help="the few cases that tell most, in two minutes")
    made.add_argument("--out", type=Path, help="write the report into this folder, as JSON and as Markdown")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(args)
    if problem := obstacle(options.out):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    report: Report = {
        "kind": "kernels",
        "machine": {**describe(), "bandwidth": timing.copy_bandwidth()},
        "results": [],
    }
    for result in measured(chosen(options), report["machine"]["bandwidth"]):
        report["results"].append(result)
        print(line(result), file=sys.stderr, flush=True)
        if options.out:
            name = f"{slug(report['machine']['device'])}-kernels"
            write(options.out / f"{name}.json", report)
            write(options.out / f"{name}.md", markdown(report))
    print(markdown(report))
    return 1 if any("failed" in result for result in report["results"]) else 0


def obstacle(folder: Path | None) -> str | None:
    """Why nothing can be timed, or kept, here."""
    if interpreted() or jax.default_backend() != "gpu" or not available():
        return "times are those of a GPU, and JAX and Triton find none here"
    if folder is not None and not folder.is_dir():
        return f"{folder} is not a folder"
    return None


def time_of(arrays: timing.Made) -> float:
    """Seconds of a call, with the block sizes that would be chosen."""
    return timing.seconds_per_call(timing.loop(arrays))


def measured(
    wanted: Sequence[Case], bandwidth: float, seconds: Callable[[timing.Made], float] = time_of
) -> Iterator[Report]:
    """Each case with the time of a call; what fails is said, and does not stop the others.

    Args:
        wanted: cases.
        bandwidth: bytes per second of a copy.
        seconds: of one call.
    """
    for case in wanted:
        found: Report = {"op": case.op, "case": case.name}
        try:
            yield found | _measure(case, bandwidth, seconds)
        except Exception as error:  # of Triton's compiler as well
            yield found | {"failed": reason(error)}


def _measure(case: Case, bandwidth: float, seconds: Callable[[timing.Made], float]) -> Report:
    arrays = timing.made(case)
    taken = seconds(arrays)
    speed = arrays.nbytes / taken
    return {
        "us": taken * 1e6,
        "bytes": arrays.nbytes,
        "bytes_per_s": speed,
        "of_copy": speed / bandwidth,
        "layers": arrays.layers,
        "cached": arrays.cached,
    }


def reason(error: Exception) -> str:
    """An error in a line."""
    text = str(error).strip().partition("\n")[0][:200]
    return text if isinstance(error, LaunchError) and text else f"{type(error).__name__}: {text}"


def line(result: Report) -> str:
    """A result in a line."""
    name = f"{result['op']}/{result['case']}"
    if "failed" in result:
        return f"{name}: failed, {result['failed']}"
    speed = f"{result['bytes_per_s'] / 1e9:,.0f} GB/s, {result['of_copy']:.0%} of a copy"
    return f"{name}: {result['us']:,.1f} µs, {speed}{', from a cache' if result['cached'] else ''}"


def markdown(report: Report) -> str:
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
            table(columns, [_row(result) for result in report["results"]], words=2) + "\n",
        ]
    )


def _row(result: Report) -> list[str]:
    cells = [result["op"], result["case"]]
    if "failed" in result:
        return [*cells, "failed", "", ""]
    share = f"{result['of_copy']:.0%}{' (from a cache)' if result['cached'] else ''}"
    return [*cells, f"{result['us']:,.2f}", f"{result['bytes_per_s'] / 1e9:,.1f}", share]


if __name__ == "__main__":
    sys.exit(main())
