"""``python -m pallas_kernels.tune``: finds and stores the fastest block sizes of every kernel on this GPU."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LaunchError, timing, tuned
from pallas_kernels.bench import add_sweep_options, format_error, select_specs, unsupported_reason
from pallas_kernels.machine_info import describe_machine
from pallas_kernels.report_format import write_report
from pallas_kernels.specs import Arrays, KernelSpec, relative_errors

TUNE_DESCRIPTION = """\
Finds the fastest block sizes of each kernel on this GPU. It starts from the heuristic and changes one size at a time.
Every candidate must give the results of the heuristic; one that does not compile or needs too much shared memory is
skipped. The sizes go into a JSON file for this GPU, which is used from the next start on. Entries that the file already
has are kept unless --again is given, so a run can be stopped and continued.

Examples:
  python -m pallas_kernels.tune
  python -m pallas_kernels.tune --ops attend --batch 1 --context 1k,2k,4k,8k,16k,32k --minutes 10
  GLM_JAX_TUNED=mine python -m pallas_kernels.tune --out mine --ops linear --kinds int4
"""
_MIN_GAIN = 0.02  # a smaller gain is noise
_MAX_PASSES = 3


class Unfit(Exception):
    """A candidate cannot be used; equal reasons are counted."""


@dataclasses.dataclass(slots=True)
class SearchResult:
    """State and result of a search.

    Attributes:
        config: Fastest block sizes so far.
        seconds: Seconds of a call with them.
        heuristic_seconds: Seconds of a call with those of the heuristic.
        num_tried: Candidates that were timed, including the heuristic.
        rejections: Number of candidates that could not be used, by reason.
    """

    config: Any
    seconds: float
    heuristic_seconds: float
    num_tried: int
    rejections: Counter[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the entry for the tuned file."""
        return {
            "shape": tuned.config_to_json(self.config),
            "us": round(self.seconds * 1e6, 3),
            "rule_us": round(self.heuristic_seconds * 1e6, 3),
            "tried": self.num_tried,
            "unfit": dict(self.rejections),
        }


def search_config(tuning_key: tuned.TuningKey[Any], measure: Callable[[Any], float]) -> SearchResult:
    """Improves one block size after the other, until no change helps.

    Args:
        tuning_key: Heuristic to start from, and the values to try.
        measure: Returns the seconds of a call with some block sizes.

    Raises:
        Unfit: If the block sizes of the heuristic cannot be used.
    """
    seconds = measure(tuning_key.heuristic)
    result = SearchResult(tuning_key.heuristic, seconds, seconds, 1, Counter())
    seen = {tuning_key.heuristic}
    for _ in range(_MAX_PASSES):
        before = result.config
        for name, values in tuning_key.search_space.items():
            for value in values:
                _try_candidate(result, dataclasses.replace(result.config, **{name: value}), seen, measure)
        if result.config == before:
            break
    return result


def _try_candidate(result: SearchResult, candidate: Any, seen: set[Any], measure: Callable[[Any], float]) -> None:
    if candidate in seen:
        return
    seen.add(candidate)
    try:
        seconds = measure(candidate)
    except Unfit as reason:
        result.rejections[str(reason)] += 1
        return
    result.num_tried += 1
    if seconds < result.seconds * (1 - _MIN_GAIN):
        result.config, result.seconds = candidate, seconds


class CandidateTimer:
    """Times a specification with one choice of block sizes after the other, and compares their results.

    The results of the first choice, which is the heuristic, are those that the others must give.

    Args:
        arrays: Arrays of the specification.
        clock: Returns the seconds of a call in a loop.
    """

    def __init__(
        self, arrays: timing.SpecArrays, clock: Callable[[timing.TimedLoop], float] = timing.measure_seconds_per_call
    ) -> None:
        self._arrays, self._clock = arrays, clock
        self._expected: list[np.ndarray] | None = None

    def __call__(self, config: Any) -> float:
        """Returns the seconds of a call.

        Raises:
            Unfit: If the kernel cannot be compiled or gives other results.
        """
        try:
            results = self._run_candidate(config)
            loop = timing.build_loop(self._arrays, config)
            loop.run_rounds(1)
        except LaunchError as error:
            raise Unfit("too much shared memory" if "shared memory" in str(error) else format_error(error)) from None
        except Exception as error:  # Triton's compiler and XLA raise many kinds
            raise Unfit(f"does not compile or run ({type(error).__name__})") from None
        if self._expected is None:
            self._expected = results
        allowed = [self._arrays.spec.tolerance(x.dtype) for x in self._expected]
        errors = relative_errors(results, self._expected)
        if not all(error <= limit for error, limit in zip(errors, allowed, strict=True)):
            raise Unfit("gives something else")
        return self._clock(loop)

    def _run_candidate(self, config: Any) -> list[np.ndarray]:
        spec = self._arrays.spec

        @jax.jit
        def run(inputs: Arrays, state: Arrays, layer_index: jax.Array) -> tuple[jax.Array, ...]:
            result, state = spec.run(inputs, state, layer_index, config)
            return spec.comparable_outputs(inputs, result, state, layer_index)

        return [np.asarray(x) for x in run(self._arrays.inputs, self._arrays.state, jnp.ones(1, jnp.int32))]


def build_tune_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description=TUNE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sweep_options(parser)
    # The capacity of a cache is a power of two: these are for up to 2k, 16k and 64k tokens.
    parser.set_defaults(context=(2048, 16_384, 65_536))
    parser.add_argument("--out", type=Path, help="folder for the file; by default that of the shipped files")
    parser.add_argument("--minutes", type=float, help="start no further case after this many minutes")
    parser.add_argument("--again", action="store_true", help="also tune cases that the file already has")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = build_tune_parser().parse_args(args)
    if problem := unsupported_reason(options.out):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    folder = options.out or tuned.tuned_dirs()[-1]
    device = jax.devices()[0].device_kind
    path = folder / tuned.tuned_filename(device)
    try:
        entries = tuned.load_tuned(path, device)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = tune(select_specs(options), path, device, entries, retune=options.again, minutes=options.minutes)
    print(f"{sum(map(len, entries.values()))} choices of block sizes in {path}")
    return 1 if failed else 0


def tune(
    specs: Sequence[KernelSpec],
    path: Path,
    device: str,
    entries: tuned.TunedEntries,
    *,
    retune: bool = False,
    minutes: float | None = None,
    search_spec: Callable[[KernelSpec, tuned.TuningKey[Any]], SearchResult] | None = None,
) -> int:
    """Searches for every specification, and writes the file after each.

    Args:
        specs: Specifications to tune.
        path: Path of the tuned file.
        device: Name of the GPU.
        entries: Entries of the file; new ones are added.
        retune: Search even if there is an entry.
        minutes: Start no further search after this many minutes.
        search_spec: Searches the block sizes of one specification; by default by running it on the device.

    Returns:
        The number of specifications that failed.
    """
    started, failed = time.monotonic(), 0
    for spec in specs:
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            print(f"stopped after {minutes:g} minutes: the same command goes on", file=sys.stderr)
            break
        try:
            key = spec.tuning_key(jax.eval_shape(lambda spec=spec: spec.make_inputs(1))[0])
            if key.key in entries.get(key.op, {}) and not retune:
                continue
            result = (search_spec or _search_on_device)(spec, key)
        except Exception as error:  # one failure must not stop the others
            failed += 1
            print(f"{spec.full_name}: failed, {format_error(error)}", file=sys.stderr, flush=True)
            continue
        entries.setdefault(key.op, {})[key.key] = result.to_json()
        write_report(path, {"device": device, "machine": describe_machine(), "ops": entries})
        print(_format_result(spec, result), file=sys.stderr, flush=True)
    return failed


def _search_on_device(spec: KernelSpec, key: tuned.TuningKey[Any]) -> SearchResult:
    return search_config(key, CandidateTimer(timing.make_arrays(spec)))


def _format_result(spec: KernelSpec, result: SearchResult) -> str:
    unfit = f", {sum(result.rejections.values())} unfit" if result.rejections else ""
    sizes = " ".join(f"{name}={value}" for name, value in tuned.config_to_json(result.config).items())
    return (
        f"{spec.full_name}: {result.seconds * 1e6:,.2f} µs, by rule {result.heuristic_seconds * 1e6:,.2f} "
        f"({result.num_tried} tried{unfit}): {sizes}"
    )


if __name__ == "__main__":
    sys.exit(main())
