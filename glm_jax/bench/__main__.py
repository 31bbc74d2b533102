"""Command line of ``python -m glm_jax.bench decode|prefill|project``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import tyro

from glm_jax.bench.options import DecodeOptions, PrefillOptions, ProjectOptions
from glm_jax.cli.common import OK, run_and_exit

COMMANDS = {"decode": DecodeOptions, "prefill": PrefillOptions, "project": ProjectOptions}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        args: Arguments of the command line; those of the process by default.
    """
    options: DecodeOptions | PrefillOptions | ProjectOptions = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="python -m glm_jax.bench",
        args=_accept_british_spelling(sys.argv[1:] if args is None else args),
        config=(tyro.conf.UseAppendAction,),
    )
    from glm_jax.bench import projection, run  # both import JAX, which --help must not wait for

    if isinstance(options, ProjectOptions):
        print(projection.project_report(options))
        return OK
    return run.measure_and_print(options)


def _accept_british_spelling(args: Sequence[str]) -> list[str]:
    """Returns the arguments with the earlier spelling ``--peer unquantised`` replaced by ``--peer unquantized``."""
    return [
        arg.replace("unquantised", "unquantized") if previous == "--peer" or arg.startswith("--peer=") else arg
        for previous, arg in itertools.pairwise(["", *args])
    ]


if __name__ == "__main__":
    run_and_exit(main)
