"""Trains the built-in miniature, or measures it and writes its card.

python examples/train_tiny.py --steps 1400          # trains in ./tiny-run; the same command goes on after a stop
python examples/train_tiny.py --evaluate            # measures ./tiny-run and writes the folder glm_jax/tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.tiny_recipe import corpus, prepare, publish  # noqa: E402
from examples.tiny_recipe.batches import Batches  # noqa: E402
from examples.tiny_recipe.bits import bits_per_byte  # noqa: E402
from examples.tiny_recipe.loop import RunFiles, train  # noqa: E402
from examples.tiny_recipe.plan import Plan, tiny_config  # noqa: E402
from glm_jax.text import render_chat  # noqa: E402

PROBE_BYTES = 24_000


def main() -> None:
    """Parses the command line and runs."""
    args = _arguments()
    if args.evaluate:
        publish.publish(RunFiles(folder=args.out), args.to)
        return
    plan = _plan(args)
    cfg = tiny_config()
    training, held_out = corpus.split(corpus.library_files())
    tokenizer = prepare.tokenizer_in(args.out, training, render_chat)
    batches = Batches(plan, tokenizer, [f.text for f in training], render_chat)
    passed = f"one pass of the library has {batches.pass_tokens / 1e6:.1f}M"
    print(f"{plan.tokens(plan.total_steps) / 1e6:.1f}M tokens in {plan.total_steps} steps; {passed}")
    facts = {
        "training_files": len(training),
        "training_bytes": sum(len(f.text.encode()) for f in training),
        "command": shlex.join(["python", "examples/train_tiny.py", *_replayed(plan)]),
        "tokens": plan.tokens(plan.total_steps),
        **dataclasses.asdict(plan),
    }
    files = RunFiles(folder=args.out)
    files.plan.write_text(json.dumps(facts, indent=2) + "\n")
    texts = prepare.probe_texts(held_out, PROBE_BYTES)
    train(
        cfg, plan, batches, files, lambda params: bits_per_byte(cfg, params, tokenizer, texts, window=512, stride=256)
    )


def _plan(args: argparse.Namespace) -> Plan:
    half = args.steps // 2
    return Plan(
        steps=args.steps,
        decay_steps=half if args.decay_steps is None else args.decay_steps,
        mtp_from=half if args.mtp_from is None else args.mtp_from,
        long_from=half if args.long_from is None else args.long_from,
        finish_steps=args.finish_steps,
        seed=args.seed,
    )


def _replayed(plan: Plan) -> list[str]:
    names = ("steps", "decay_steps", "mtp_from", "long_from", "finish_steps", "seed")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(plan, name)))]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-run"), help="folder of the run: tokenizer, checkpoint, log"
    )
    parser.add_argument("--steps", type=int, default=1400, help="steps of 4096 tokens")
    parser.add_argument("--decay-steps", type=int, help="last steps, in which the rate falls to zero (default: half)")
    parser.add_argument("--mtp-from", type=int, help="first step with the prediction layer (default: at half)")
    parser.add_argument("--long-from", type=int, help="first step with rows of 512 tokens of code (default: at half)")
    parser.add_argument("--finish-steps", type=int, default=260, help="steps after that, mostly of conversations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="measure the run, and write the model and its card")
    parser.add_argument("--to", type=Path, default=ROOT / "glm_jax" / "tiny", help="where --evaluate writes")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
