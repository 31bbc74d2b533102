"""Command line of ``python -m convert.verify``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import tyro
from tyro.conf import FlagCreatePairsOff

from convert.verify.options import VerifyOptions, validate_options
from glm_jax.cli.common import OK, read_prompt_text, run_and_exit

DESCRIPTION = """\
Measure how close a model is to the one it was made from: sizes, errors of the weights, and on a text the divergence of
its predictions from the original's. The report goes to stdout, progress to stderr.

Examples:
  python -m convert.verify ./int4 --against ./original --text held_out.txt
  python -m convert.verify ./int4 --against ./original --weights-only     sizes and errors alone, in little memory
  python -m convert.verify tiny --against tiny --quantize int4 --method rtn --text held_out.txt
                                     the same without converting first: DST is quantized while it is read
  python -m convert.verify tiny --against tiny --cache-dtype int8 --text held_out.txt
                                     the cost of an 8-bit cache alone
  python -m convert.verify tiny --against tiny --quantize int4 --chat tiny
                                     the built-in miniature's held-out chat tasks
  python -m convert.verify ./int4 --against ./original --text held_out.txt --positions a.npz --json a.json
                                     for python -m convert.compare a.npz b.npz

Give text that neither model was trained or calibrated on, of the kind the model is for: 100,000 tokens determine the
mean divergence to a few per cent. Both models must fit on the device together.
Exit codes: 0 success, 2 bad usage or input, 1 failure, 130 interrupted.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        args: Arguments of the command line; those of the process by default.
    """
    options = tyro.cli(
        VerifyOptions, prog="python -m convert.verify", description=DESCRIPTION, args=args, config=(FlagCreatePairsOff,)
    )
    validate_options(options)
    texts = [read_prompt_text(name) for name in options.text]
    from convert.verify import run  # imports JAX, which --help and usage errors need not wait for

    report, positions = run.run_verification(options, texts)
    tables = run.render_quality_report(report)
    print(tables, end="")
    if options.markdown:
        options.markdown.write_text(tables, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.positions and positions:
        positions.save(options.positions)
    return OK


if __name__ == "__main__":
    run_and_exit(main)
