"""``python -m glm_jax.bench decode|prefill|project``: time per token, speeds and bandwidth, beside peers in one run."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from glm_jax.bench.options import Decode, Prefill
from glm_jax.bench.projection import Project, project
from glm_jax.cli.common import OK, finish

COMMANDS = {"decode": Decode, "prefill": Prefill, "project": Project}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options: Decode | Prefill | Project = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m glm_jax.bench", args=args, config=(tyro.conf.UseAppendAction,)
    )
    if isinstance(options, Project):
        print(project(options))
        return OK
    from glm_jax.bench.run import measure

    return measure(options)


if __name__ == "__main__":
    finish(main)
