"""Command line of ``python -m glm_jax.plan``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import tyro

from glm_jax.cli.common import OK, run_and_exit, set_memory_fraction
from glm_jax.plan.options import PlanOptions

DESCRIPTION = """\
Plan a model's memory: weights by part, cache, longest context, concurrent sequences, and the bound that memory
bandwidth sets on decoding. Reads config.json only; nothing is loaded. The exit code is 0 whether it fits or not (--json
says "fits"), 2 for bad input.

Examples:
  python -m glm_jax.plan --model zai-org/GLM-4.7-Flash                on the local device
  python -m glm_jax.plan --model synthetic:flash --gpu h100           on a GPU that is not present
  python -m glm_jax.plan --model synthetic:flash --gpu b200x4 --context 32768 --sequences 64
  python -m glm_jax.plan --model ./converted --gpu rtxpro6000 --json | jq .max_context
  python -m glm_jax.plan --model synthetic:flash --gpu h200 --quantize int4 --context 8192 --compile

GPUs: rtx6000-ada rtxpro6000 h100 h200 b200; for memory only: a100-80gb l40s rtx5090 rtx4090 rtx3090.
Several (NAMExN, or --mesh) share the model by attention heads and expert widths; each holds the whole cache.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        args: Arguments of the command line; those of the process by default.
    """
    options = tyro.cli(PlanOptions, prog="python -m glm_jax.plan", description=DESCRIPTION, args=args)
    set_memory_fraction(options.memory_fraction)
    # Reading a GPU's size should not take its memory from other processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from glm_jax.plan.run import plan_and_print  # imports JAX, which must read the environment first

    plan_and_print(options)
    return OK


if __name__ == "__main__":
    run_and_exit(main)
