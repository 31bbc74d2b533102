"""``python -m glm_jax.bench decode|prefill|project``: time per token, speeds and bandwidth, beside peers in one run."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from glm_jax.bench.options import DecodeOptions, PrefillOptions
from glm_jax.bench.projection import ProjectOptions, project_report
from glm_jax.cli.common import OK, run_and_exit

COMMANDS = {"decode": DecodeOptions, "prefill": PrefillOptions, "project": ProjectOptions}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options: DecodeOptions | PrefillOptions | ProjectOptions = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m glm_jax.bench", args=args, config=(tyro.conf.UseAppendAction,)
    )
    if isinstance(options, ProjectOptions):
        print(project_report(options))
        return OK
    from glm_jax.bench.run import measure_and_print

    return measure_and_print(options)


if __name__ == "__main__":
    run_and_exit(main)
