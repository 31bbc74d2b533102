"""Trains the built-in miniature, or evaluates it and publishes it with its model card.

python examples/train_tiny.py --steps 3000          # trains in ./tiny-run; the same command resumes an interrupted run
python examples/train_tiny.py --evaluate            # evaluates ./tiny-run and writes the folder glm_jax/tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.tiny_recipe import corpus, prepare, publish  # noqa: E402
from examples.tiny_recipe.batches import Batches  # noqa: E402
from examples.tiny_recipe.bits_per_byte import bits_per_byte  # noqa: E402
from examples.tiny_recipe.conversations import held_out_conversations  # noqa: E402
from examples.tiny_recipe.schedule import TrainingSchedule, tiny_config  # noqa: E402
from examples.tiny_recipe.teacher_forcing import teacher_forced_correct  # noqa: E402
from examples.tiny_recipe.training_loop import RunFiles, train  # noqa: E402
from glm_jax.text import render_chat  # noqa: E402

PROBE_BYTES, PROBE_TASKS = 24_000, 10


def main() -> None:
    """Runs the command."""
    args = _parse_arguments()
    if args.evaluate:
        publish.publish(RunFiles(folder=args.out), args.to)
        return
    plan = _schedule(args)
    cfg = tiny_config()
    training, held_out = corpus.split_held_out(corpus.library_files())
    tokenizer = prepare.load_or_train_tokenizer(args.out, training, render_chat)
    batches = Batches(plan, tokenizer, [f.text for f in training], render_chat)
    epoch = f"one epoch of the library has {batches.epoch_tokens / 1e6:.1f}M"
    print(f"{plan.tokens_before(plan.steps) / 1e6:.1f}M tokens in {plan.steps} steps; {epoch}")
    facts = {
        "training_files": len(training),
        "training_bytes": sum(len(f.text.encode()) for f in training),
        "command": shlex.join(["python", "examples/train_tiny.py", *_command_options(plan)]),
        "tokens": plan.tokens_before(plan.steps),
        **dataclasses.asdict(plan),
    }
    files = RunFiles(folder=args.out)
    files.plan.write_text(json.dumps(facts, indent=2) + "\n")
    texts = prepare.probe_texts(held_out, PROBE_BYTES)
    conversations = held_out_conversations(Random("probe"), PROBE_TASKS, PROBE_TASKS)

    def probe(params: Any) -> dict[str, float]:
        is_correct = teacher_forced_correct(cfg, params, tokenizer, conversations, render_chat)
        bits = bits_per_byte(cfg, params, tokenizer, texts, window=512, stride=256)
        return {"bpb": bits, "right": sum(is_correct) / len(is_correct)}

    train(cfg, plan, batches, files, probe)


def _schedule(args: argparse.Namespace) -> TrainingSchedule:
    decay = args.steps // 3 if args.decay_steps is None else args.decay_steps
    return TrainingSchedule(steps=args.steps, decay_steps=decay, seed=args.seed)


def _command_options(plan: TrainingSchedule) -> list[str]:
    names = ("steps", "decay_steps", "seed")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(plan, name)))]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-run"), help="folder of the run: tokenizer, checkpoint, log"
    )
    parser.add_argument("--steps", type=int, default=3000, help="steps of about 3,200 tokens")
    parser.add_argument(
        "--decay-steps", type=int, help="last steps, over which the learning rate decays to zero (default: a third)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the run, and write the model and its card")
    parser.add_argument("--to", type=Path, default=ROOT / "glm_jax" / "tiny", help="where --evaluate writes")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
