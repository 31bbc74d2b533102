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
from pallas_kernels.bench import chosen, obstacle, reason, sweep_options
from pallas_kernels.machine_info import describe
from pallas_kernels.report_format import write
from pallas_kernels.specs import Case, difference

DESCRIPTION = """\
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
_GAIN = 0.02
_MOST_PASSES = 3


class Unfit(Exception):
    """A candidate that cannot be used, and why, in words that are counted."""


@dataclasses.dataclass(slots=True)
class Found:
    """What a search has come to.

    Attributes:
        shape: the fastest block sizes.
        seconds: of a call with them.
        rule_seconds: with those of the rule.
        tried: candidates that were timed, the rule's included.
        unfit: why others were not, and how many.
    """

    shape: Any
    seconds: float
    rule_seconds: float
    tried: int
    unfit: Counter[str]

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "shape": dataclasses.asdict(self.shape),
            "us": round(self.seconds * 1e6, 3),
            "rule_us": round(self.rule_seconds * 1e6, 3),
            "tried": self.tried,
            "unfit": dict(self.unfit),
        }


def search(problem: tuned.Problem[Any], seconds: Callable[[Any], float]) -> Found:
    """Changes one block size after the other for the better, until none does.

    Args:
        problem: where to begin, and what to try.
        seconds: of a call with some block sizes.

    Raises:
        Unfit: where not even the rule's can be used.
    """
    rule = seconds(problem.rule)
    found = Found(problem.rule, rule, rule, 1, Counter())
    seen = {problem.rule}
    for _ in range(_MOST_PASSES):
        before = found.shape
        for name, values in problem.axes.items():
            for value in values:
                _consider(found, dataclasses.replace(found.shape, **{name: value}), seen, seconds)
        if found.shape == before:
            break
    return found


def _consider(found: Found, candidate: Any, seen: set[Any], seconds: Callable[[Any], float]) -> None:
    if candidate in seen:
        return
    seen.add(candidate)
    try:
        taken = seconds(candidate)
    except Unfit as why:
        found.unfit[str(why)] += 1
        return
    found.tried += 1
    if taken < found.seconds * (1 - _GAIN):
        found.shape, found.seconds = candidate, taken


class Trial:
    """Runs a case with one choice of block sizes after the other, and compares what it gives with the rule's.

    Args:
        arrays: of the case.
        clock: seconds of a call of a loop.
    """

    def __init__(self, arrays: timing.Made, clock: Callable[[timing.Loop], float] = timing.seconds_per_call) -> None:
        self._arrays, self._clock = arrays, clock
        self._expected: list[np.ndarray] | None = None

    def __call__(self, shape: Any) -> float:
        """Seconds of a call.

        Raises:
            Unfit: if it cannot be compiled, or gives something else.
        """
        try:
            results = self._results(shape)
            work = timing.loop(self._arrays, shape)
            work.rounds(1)
        except LaunchError as error:
            raise Unfit("too much shared memory" if "shared memory" in str(error) else reason(error)) from None
        except Exception as error:  # of Triton's compiler, and of XLA
            raise Unfit(f"does not compile or run ({type(error).__name__})") from None
        if self._expected is None:
            self._expected = results
        allowed = [self._arrays.case.tolerance(x.dtype) for x in self._expected]
        errors = difference(results, self._expected)
        if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
            raise Unfit("gives something else")
        return self._clock(work)

    def _results(self, shape: Any) -> list[np.ndarray]:
        case, place = self._arrays.case, jnp.ones(1, jnp.int32)
        run = jax.jit(lambda given, state, place: case.view(given, *case.run(given, state, place, shape), place))
        return [np.asarray(x) for x in run(self._arrays.given, self._arrays.state, place)]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep_options(made)
    # Caches have powers of two of slots: these are for up to 2k, 16k and 64k tokens.
    made.set_defaults(context=(2048, 16_384, 65_536))
    made.add_argument("--out", type=Path, help="folder for the file; beside those shipped unless given")
    made.add_argument("--minutes", type=float, help="begin no further case after so many")
    made.add_argument("--again", action="store_true", help="also what is in the file already")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(args)
    if problem := obstacle(options.out):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    folder = options.out or tuned.folders()[-1]
    device = jax.devices()[0].device_kind
    path = folder / tuned.file_name(device)
    try:
        kept = tuned.read(path, device)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = tune(chosen(options), path, device, kept, again=options.again, minutes=options.minutes)
    print(f"{sum(map(len, kept.values()))} choices of block sizes in {path}")
    return 1 if failed else 0


def tune(
    wanted: Sequence[Case],
    path: Path,
    device: str,
    kept: dict[str, dict[str, Any]],
    *,
    again: bool = False,
    minutes: float | None = None,
    found_by: Callable[[Case, tuned.Problem[Any]], Found] | None = None,
) -> int:
    """Searches for every case, and writes the file after each.

    Args:
        wanted: cases.
        path: of the file.
        device: name of the card.
        kept: what is in the file, which is added to.
        again: search even where something is kept.
        minutes: begin no further case after so many.
        found_by: searches; by running on the card unless given.

    Returns:
        How many cases failed.
    """
    begun, failed = time.monotonic(), 0
    for case in wanted:
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            print(f"stopped after {minutes:g} minutes: the same command goes on", file=sys.stderr)
            break
        try:
            problem = case.problem(jax.eval_shape(lambda case=case: case.make(1))[0])
            if problem.key in kept.get(problem.op, {}) and not again:
                continue
            found = (found_by or _on_card)(case, problem)
        except Exception as error:  # one case must not take the others with it
            failed += 1
            print(f"{case.full_name}: failed, {reason(error)}", file=sys.stderr, flush=True)
            continue
        kept.setdefault(problem.op, {})[problem.key] = found.to_json()
        write(path, {"device": device, "machine": describe(), "ops": kept})
        print(_line(case, found), file=sys.stderr, flush=True)
    return failed


def _on_card(case: Case, problem: tuned.Problem[Any]) -> Found:
    return search(problem, Trial(timing.made(case)))


def _line(case: Case, found: Found) -> str:
    unfit = f", {sum(found.unfit.values())} unfit" if found.unfit else ""
    sizes = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(found.shape).items())
    return (
        f"{case.full_name}: {found.seconds * 1e6:,.2f} µs, by rule {found.rule_seconds * 1e6:,.2f} ({found.tried} tried"
        f"{unfit}): {sizes}"
    )


if __name__ == "__main__":
    sys.exit(main())
