"""Training checkpoints: one file, written atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.tiny_recipe.train_step import TrainState


def save_state(path: Path, step: int, state: TrainState) -> None:
    """Saves the state before ``step``; an interruption leaves the previous file intact."""
    leaves: dict[str, Any] = {f"leaf_{i:03}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, step=np.int64(step), **leaves)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path, template: TrainState) -> tuple[int, TrainState]:
    """Loads the next step and the state, in the structure of ``template``.

    Raises:
        ValueError: if the file belongs to another model or optimizer.
    """
    expected, structure = jax.tree.flatten(template)
    with np.load(path) as file:
        leaves = [file[name] for name in sorted(file.files) if name.startswith("leaf_")]
        step = int(file["step"])
    if [leaf.shape for leaf in leaves] != [np.shape(leaf) for leaf in expected]:
        raise ValueError(f"{path} holds another model; remove it or choose another --out")
    return step, jax.tree.unflatten(structure, [jax.numpy.asarray(leaf) for leaf in leaves])
