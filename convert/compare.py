"""``python -m convert.compare A.npz B.npz``: which of two models is closer to their source, and is it chance?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from glm_jax.cli.common import OK, run_and_exit
from glm_jax.errors import PromptError

DESCRIPTION = """\
Compare two models by what `python -m convert.verify --positions` wrote of each, on the same text.

Examples:
  python -m convert.verify ./int4-mse --against ./original --text held_out.txt --positions mse.npz
  python -m convert.verify ./int4-rtn --against ./original --text held_out.txt --positions rtn.npz
  python -m convert.compare mse.npz rtn.npz

Differences are A minus B, with the 95 % interval of a paired bootstrap that draws whole windows: tokens of one window
depend on each other. An interval that holds 0 says that the text does not tell the two apart.
Exit codes: 0 done, 2 bad usage or input, 1 failure, 130 interrupted.
"""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options of the command."""

    first: Annotated[Path, Positional, arg(metavar="A.npz")]
    """Positions of one model."""
    second: Annotated[Path, Positional, arg(metavar="B.npz")]
    """Positions of the other."""
    resamples: Annotated[int, arg(metavar="N")] = 10_000
    """How often to draw the windows anew."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the draws."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the figures to this file."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = tyro.cli(
        CompareOptions,
        prog="python -m convert.compare",
        description=DESCRIPTION,
        args=args,
        config=(FlagCreatePairsOff,),
    )
    if options.resamples < 100 or options.seed < 0:
        raise PromptError("--resamples must be at least 100, and --seed 0 or more")
    found = compare_models(options.first, options.second, options.resamples, options.seed)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"A {options.first}, B {options.second}: {found['tokens']:,} tokens in {found['windows']:,} windows")
    for name, words in _METRICS.items():
        figure = found[name]
        low, high = figure["difference_95"]
        print(
            f"{words}: A {figure['a']:.6g}, B {figure['b']:.6g}, "
            f"A - B {figure['difference']:+.3g} (95 % {low:+.3g} to {high:+.3g}){_significance_note(low, high)}"
        )
    return OK


_METRICS = {"kl": "mean KL in nats", "nll": "log perplexity", "agree": "same most likely token"}


def compare_models(first: Path, second: Path, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Means of both files, and their differences with 95 % intervals.

    Raises:
        GlmError: if a file is no such file.
        PromptError: if they are about different texts.
    """
    import numpy as np

    from convert.quality.divergence import PositionMetrics
    from convert.quality.statistics import paired_bootstrap

    a, b = PositionMetrics.load(first), PositionMetrics.load(second)
    if a.text != b.text or a.kl.shape != b.kl.shape:
        raise PromptError(f"{first} and {second} are about different tokens: give both the same --text and --window")
    found: dict[str, Any] = {"windows": len(a.kl), "tokens": int((~np.isnan(a.kl)).sum())}
    for name in _METRICS:
        ours, theirs = getattr(a, name), getattr(b, name)
        difference, *ends = paired_bootstrap(ours, theirs, resamples, seed)
        means = [float(np.nanmean(values, dtype=np.float64)) for values in (ours, theirs)]
        found[name] = {"a": means[0], "b": means[1], "difference": difference, "difference_95": ends}
    return found


def _significance_note(low: float, high: float) -> str:
    return "" if low > 0 or high < 0 else ", no difference that this text shows"


if __name__ == "__main__":
    run_and_exit(main)
