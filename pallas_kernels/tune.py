"""``python -m pallas_kernels.tune``: the fastest block sizes of every kernel on the card at hand, kept for later."""

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
from pallas_kernels.specs import KernelSpec, relative_errors

TUNE_DESCRIPTION = """\
Finds the block sizes with which each kernel is fastest on the card at hand, one size after the other, from those of the
rule on. Every candidate must give what the rule's give; one that does not compile or needs too much shared memory is
passed over. What is found goes into a JSON file for this card, and is used from the next start on. What is in the file
already is kept unless --again is given, so that a run can be stopped and taken up.

Examples:
  python -m pallas_kernels.tune
  python -m pallas_kernels.tune --ops attend --batch 1 --context 1k,2k,4k,8k,16k,32k --minutes 10
  GLM_JAX_TUNED=mine python -m pallas_kernels.tune --out mine --ops linear --kinds int4
"""
# Less than this is noise.
_MIN_GAIN = 0.02
_MAX_PASSES = 3


class Unfit(Exception):
    """A candidate that cannot be used, and why, in words that are counted."""


@dataclasses.dataclass(slots=True)
class SearchResult:
    """What a search has come to.

    Attributes:
        config: the fastest block sizes.
        seconds: of a call with them.
        heuristic_seconds: with those of the rule.
        num_tried: candidates that were timed, the rule's included.
        rejections: why others were not, and how many.
    """

    config: Any
    seconds: float
    heuristic_seconds: float
    num_tried: int
    rejections: Counter[str]

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "shape": dataclasses.asdict(self.config),
            "us": round(self.seconds * 1e6, 3),
            "rule_us": round(self.heuristic_seconds * 1e6, 3),
            "tried": self.num_tried,
            "unfit": dict(self.rejections),
        }


def search_config(tuning_key: tuned.TuningKey[Any], measure: Callable[[Any], float]) -> SearchResult:
    """Changes one block size after the other for the better, until none does.

    Args:
        tuning_key: where to begin, and what to try.
        measure: of a call with some block sizes.

    Raises:
        Unfit: where not even the rule's can be used.
    """
    rule = measure(tuning_key.heuristic)
    found = SearchResult(tuning_key.heuristic, rule, rule, 1, Counter())
    seen = {tuning_key.heuristic}
    for _ in range(_MAX_PASSES):
        before = found.config
        for name, values in tuning_key.search_space.items():
            for value in values:
                _try_candidate(found, dataclasses.replace(found.config, **{name: value}), seen, measure)
        if found.config == before:
            break
    return found


def _try_candidate(found: SearchResult, candidate: Any, seen: set[Any], seconds: Callable[[Any], float]) -> None:
    if candidate in seen:
        return
    seen.add(candidate)
    try:
        taken = seconds(candidate)
    except Unfit as why:
        found.rejections[str(why)] += 1
        return
    found.num_tried += 1
    if taken < found.seconds * (1 - _MIN_GAIN):
        found.config, found.seconds = candidate, taken


class CandidateTimer:
    """Runs a case with one choice of block sizes after the other, and compares what it gives with the rule's.

    Args:
        arrays: of the case.
        clock: seconds of a call of a loop.
    """

    def __init__(
        self, arrays: timing.SpecArrays, clock: Callable[[timing.TimedLoop], float] = timing.measure_seconds_per_call
    ) -> None:
        self._arrays, self._clock = arrays, clock
        self._expected: list[np.ndarray] | None = None

    def __call__(self, config: Any) -> float:
        """Seconds of a call.

        Raises:
            Unfit: if it cannot be compiled, or gives something else.
        """
        try:
            results = self._run_candidate(config)
            work = timing.build_loop(self._arrays, config)
            work.run_rounds(1)
        except LaunchError as error:
            raise Unfit("too much shared memory" if "shared memory" in str(error) else format_error(error)) from None
        except Exception as error:  # of Triton's compiler, and of XLA
            raise Unfit(f"does not compile or run ({type(error).__name__})") from None
        if self._expected is None:
            self._expected = results
        allowed = [self._arrays.spec.tolerance(x.dtype) for x in self._expected]
        errors = relative_errors(results, self._expected)
        if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
            raise Unfit("gives something else")
        return self._clock(work)

    def _run_candidate(self, shape: Any) -> list[np.ndarray]:
        case, place = self._arrays.spec, jnp.ones(1, jnp.int32)
        run = jax.jit(
            lambda given, state, place: case.comparable_outputs(given, *case.run(given, state, place, shape), place)
        )
        return [np.asarray(x) for x in run(self._arrays.inputs, self._arrays.state, place)]


def build_tune_parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description=TUNE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sweep_options(made)
    # Caches have powers of two of slots: these are for up to 2k, 16k and 64k tokens.
    made.set_defaults(context=(2048, 16_384, 65_536))
    made.add_argument("--out", type=Path, help="folder for the file; beside those shipped unless given")
    made.add_argument("--minutes", type=float, help="begin no further case after so many")
    made.add_argument("--again", action="store_true", help="also what is in the file already")
    return made


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
        kept = tuned.load_tuned(path, device)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = tune(select_specs(options), path, device, kept, retune=options.again, minutes=options.minutes)
    print(f"{sum(map(len, kept.values()))} choices of block sizes in {path}")
    return 1 if failed else 0


def tune(
    specs: Sequence[KernelSpec],
    path: Path,
    device: str,
    entries: dict[str, dict[str, Any]],
    *,
    retune: bool = False,
    minutes: float | None = None,
    search_spec: Callable[[KernelSpec, tuned.TuningKey[Any]], SearchResult] | None = None,
) -> int:
    """Searches for every case, and writes the file after each.

    Args:
        specs: cases.
        path: of the file.
        device: name of the card.
        entries: what is in the file, which is added to.
        retune: search even where something is kept.
        minutes: begin no further case after so many.
        search_spec: searches; by running on the card unless given.

    Returns:
        How many cases failed.
    """
    begun, failed = time.monotonic(), 0
    for case in specs:
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            print(f"stopped after {minutes:g} minutes: the same command goes on", file=sys.stderr)
            break
        try:
            problem = case.tuning_key(jax.eval_shape(lambda case=case: case.make(1))[0])
            if problem.key in entries.get(problem.op, {}) and not retune:
                continue
            found = (search_spec or _search_on_device)(case, problem)
        except Exception as error:  # one case must not take the others with it
            failed += 1
            print(f"{case.full_name}: failed, {format_error(error)}", file=sys.stderr, flush=True)
            continue
        entries.setdefault(problem.op, {})[problem.key] = found.to_json()
        write_report(path, {"device": device, "machine": describe_machine(), "ops": entries})
        print(_format_result(case, found), file=sys.stderr, flush=True)
    return failed


def _search_on_device(case: KernelSpec, problem: tuned.TuningKey[Any]) -> SearchResult:
    return search_config(problem, CandidateTimer(timing.make_arrays(case)))


def _format_result(case: KernelSpec, found: SearchResult) -> str:
    unfit = f", {sum(found.rejections.values())} unfit" if found.rejections else ""
    sizes = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(found.config).items())
    return (
        f"{case.full_name}: {found.seconds * 1e6:,.2f} µs, by rule {found.heuristic_seconds * 1e6:,.2f} ({found.num_tried} tried"
        f"{unfit}): {sizes}"
    )


if __name__ == "__main__":
    sys.exit(main())
