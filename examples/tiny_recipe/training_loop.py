"""The training loop: steps, log, probes and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.tiny_recipe.batches import Batches
from examples.tiny_recipe.schedule import TrainingSchedule
from examples.tiny_recipe.train_step import TrainState, initial_state, make_train_step
from examples.tiny_recipe.training_checkpoint import load_state, save_state
from glm_jax.config import Config

LineWriter = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The files of a run and how often they are written.

    Attributes:
        folder: Folder of the run.
        log_every: Steps between records of the log.
        save_every: Steps between checkpoints.
        probe_every: Steps between probes on held-out data.
    """

    folder: Path
    log_every: int = 10
    save_every: int = 50
    probe_every: int = 100

    @property
    def state(self) -> Path:
        """The training checkpoint."""
        return self.folder / "state.npz"

    @property
    def plan(self) -> Path:
        """Facts about the data and the schedule, for the model card."""
        return self.folder / "plan.json"

    @property
    def log(self) -> Path:
        """The log: one JSON object per line."""
        return self.folder / "log.jsonl"


def train(
    cfg: Config,
    plan: TrainingSchedule,
    batches: Batches,
    files: RunFiles,
    probe: Callable[[Any], dict[str, float]],
    write_line: LineWriter = print,
    stop_step: int | None = None,
) -> TrainState:
    """Trains to the end of the schedule, resuming from the checkpoint if there is one.

    Args:
        cfg: Architecture of the model.
        plan: Training schedule.
        batches: Training batches.
        files: Files of the run.
        probe: Measures parameters on a little held-out data ("bpb": bits per byte, "right": share of right answers).
        write_line: Receives the lines of progress.
        stop_step: Step before which to stop; None trains to the end.

    Returns:
        The state after the last step.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    state, first = initial_state(cfg, plan), 0
    if files.state.exists():
        first, state = load_state(files.state, state)
        _truncate_log(files.log, first)
        write_line(f"resuming at step {first}")
    meter = _ThroughputMeter(plan, first)
    last = plan.steps if stop_step is None else min(stop_step, plan.steps)
    for step in range(first, last):
        stage, rate = plan.stage(step), plan.learning_rate_scale(step)
        train_step = make_train_step(cfg, plan, with_mtp=stage.mtp, chat_weight=stage.chat_weight)
        state, metrics = train_step(state, batches(step), jnp.float32(rate), jnp.float32(plan.bias_rate * rate))
        done = step + 1
        if done % files.log_every == 0 or done == last:
            record = meter.record(done, metrics)
            if done % files.probe_every == 0 or done == plan.steps:
                record |= probe(state.params)
            _append_record(files.log, record)
            write_line(_progress_line(record))
        if done % files.save_every == 0 or done == last:
            save_state(files.state, done, state)
    return state


class _ThroughputMeter:
    """Adds tokens per second since the last record, and the remaining time at that rate, to the metrics."""

    def __init__(self, plan: TrainingSchedule, step: int) -> None:
        self.plan, self.step, self.time = plan, step, time.monotonic()

    def record(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        rate = (self.plan.tokens_before(step) - self.plan.tokens_before(self.step)) / (now - self.time)
        self.step, self.time = step, now
        seconds_left = (self.plan.tokens_before(self.plan.steps) - self.plan.tokens_before(step)) / rate
        return {
            "step": step,
            "tokens": self.plan.tokens_before(step),
            **values,
            "tokens_per_s": rate,
            "seconds_left": seconds_left,
        }


def _progress_line(record: dict[str, float]) -> str:
    names = ("loss", "code", "chat", "draft", "worst_load", "grad_norm", "bpb", "right")
    shown = " ".join(f"{name} {record[name]:.3f}" for name in names if name in record)
    speed = f"{record['tokens_per_s']:.0f} tokens/s, {record['seconds_left'] / 60:.0f} min left"
    return f"step {record['step']} {record['tokens'] / 1e6:.2f}M {shown} | {speed}"


def _append_record(path: Path, record: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({k: round(v, 5) for k, v in record.items()}) + "\n")


def _truncate_log(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
