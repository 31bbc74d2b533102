"""Command line of ``python -m convert.compare``: which of two models is closer to their source, and is it chance?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from convert.quality.position_metrics import PositionMetrics
from convert.quality.statistics import paired_bootstrap
from glm_jax.cli.common import OK, run_and_exit
from glm_jax.errors import PromptError

DESCRIPTION = """\
Compare two models by the files that `python -m convert.verify --positions` wrote for each, on the same text.

Examples:
  python -m convert.verify ./int4-mse --against ./original --text held_out.txt --positions mse.npz
  python -m convert.verify ./int4-rtn --against ./original --text held_out.txt --positions rtn.npz
  python -m convert.compare mse.npz rtn.npz

Differences are A minus B, with the 95 % interval of a paired bootstrap that resamples whole windows, because tokens of
one window depend on each other. If the interval contains 0, the text shows no difference between the two.
Exit codes: 0 success, 2 bad usage or input, 1 failure, 130 interrupted.
"""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options of the command."""

    first: Annotated[Path, Positional, arg(metavar="A.npz")]
    """File of positions of one model."""
    second: Annotated[Path, Positional, arg(metavar="B.npz")]
    """File of positions of the other model."""
    resamples: Annotated[int, arg(metavar="N")] = 10_000
    """Number of bootstrap resamples."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the bootstrap."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the figures to this file, as JSON."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        args: Arguments of the command line; those of the process by default.
    """
    options = tyro.cli(
        CompareOptions,
        prog="python -m convert.compare",
        description=DESCRIPTION,
        args=args,
        config=(FlagCreatePairsOff,),
    )
    if options.resamples < 100 or options.seed < 0:
        raise PromptError("--resamples must be at least 100, and --seed 0 or more")
    report = compare_positions(options.first, options.second, options.resamples, options.seed)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"A {options.first}, B {options.second}: {report['tokens']:,} tokens in {report['windows']:,} windows")
    for name, title in _METRICS.items():
        figure = report[name]
        low, high = figure["difference_95"]
        print(
            f"{title}: A {figure['a']:.6g}, B {figure['b']:.6g}, "
            f"A - B {figure['difference']:+.3g} (95 % {low:+.3g} to {high:+.3g}){_significance_note(low, high)}"
        )
    return OK


_METRICS = {"kl": "mean KL in nats", "nll": "log perplexity", "agree": "same most likely token"}


def compare_positions(first: Path, second: Path, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Returns the means of each metric in both files, and their differences with 95 % intervals.

    Args:
        first: File of positions of model A.
        second: File of positions of model B.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        GlmError: if a file cannot be read, or is not a file of positions.
        PromptError: if the files are about different texts.
    """
    a, b = PositionMetrics.load(first), PositionMetrics.load(second)
    if a.text != b.text or a.kl.shape != b.kl.shape:
        raise PromptError(f"{first} and {second} are about different tokens: give both the same --text and --window")
    report: dict[str, Any] = {"windows": len(a.kl), "tokens": int((~np.isnan(a.kl)).sum())}
    for name in _METRICS:
        values = getattr(a, name), getattr(b, name)
        difference, *interval = paired_bootstrap(*values, resamples, seed)
        mean_a, mean_b = (float(np.nanmean(array, dtype=np.float64)) for array in values)
        report[name] = {"a": mean_a, "b": mean_b, "difference": difference, "difference_95": interval}
    return report


def _significance_note(low: float, high: float) -> str:
    return "" if low > 0 or high < 0 else ", no difference that this text shows"


if __name__ == "__main__":
    run_and_exit(main)
