"""Bytes of two models, and the distance of their weights, read matrix by matrix."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, Leaf
from glm_jax.checkpoint.progress import progress_bar
from glm_jax.checkpoint.sources.base import WeightChunk, WeightSource, source_storage, to_plain_array
from glm_jax.errors import CheckpointError
from glm_jax.weights.params import is_matrix, leaves_with_path, param_specs
from glm_jax.weights.storage import abstract_params

_BLOCK_VALUES = 1 << 20  # compared at a time, in float32

# In the order of the report.
WEIGHT_KINDS = (
    "attention",
    "experts",
    "shared experts",
    "dense MLP",
    "router",
    "embedding",
    "head",
    "prediction layer",
    "norms and biases",
)


@dataclasses.dataclass(slots=True)
class SquaredErrorSums:
    """Sums of squares, of a difference and of what it is a difference from."""

    error_sum_sq: float = 0.0
    weight_sum_sq: float = 0.0

    def add(self, other: SquaredErrorSums) -> None:
        """Adds those of other matrices."""
        self.error_sum_sq += other.error_sum_sq
        self.weight_sum_sq += other.weight_sum_sq

    @property
    def relative_error(self) -> float | None:
        """``||W - W'|| / ||W||``; None for a difference from nothing but zeros."""
        if not self.weight_sum_sq:
            return None if self.error_sum_sq else 0.0
        return math.sqrt(self.error_sum_sq / self.weight_sum_sq)


def weight_kind(leaf: Leaf) -> str:
    """One of :data:`WEIGHT_KINDS`."""
    name = leaf.path[-1]
    if leaf.checkpoint_name == MTP:
        return "prediction layer" if is_matrix(leaf.spec) else "norms and biases"
    if not is_matrix(leaf.spec):
        return "norms and biases"
    if leaf.checkpoint_name == NON_LAYER:
        return "embedding" if name == "embed" else "head"
    if leaf.path[0] == "moe":
        return "router" if name == "router" else "shared experts" if name.startswith("shared_") else "experts"
    return "dense MLP" if leaf.path[0] == "mlp" else "attention"


def model_sizes(source: WeightSource, dtype: str = "bfloat16") -> dict[str, Any]:
    """Bytes and parameters of a model as it lies on a device, main model and prediction layer apart.

    Args:
        source: the weights.
        dtype: that it is loaded with: of every parameter that is not quantized and has no dtype of its own.
    """
    totals = {name: {"parameters": 0, "bytes": 0} for name in ("main", "mtp")}
    held = dict(leaves_with_path(abstract_params(source.cfg, dtype, storage=source_storage(source))))
    for path, spec in leaves_with_path(param_specs(source.cfg)):
        total = totals["mtp" if path[0] == MTP else "main"]
        total["parameters"] += spec.size
        total["bytes"] += sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(held[path]))
    main = totals["main"]
    return {**totals, "bits_per_weight": 8 * main["bytes"] / main["parameters"]}


def weight_errors(reference: WeightSource, other: WeightSource, *, progress: bool = False) -> dict[str, Any]:
    """Relative errors ``||W - W'||_F / ||W||_F`` of every matrix, and of all of a kind or a layer together.

    A few million values of each model are in memory at a time. What only one of the two has (a prediction layer) is
    left out.

    Raises:
        CheckpointError: if a weight is NaN or infinite, or its bytes are not there.
    """
    theirs = {(leaf.checkpoint_name, leaf.name): leaf for members in other.layout().values() for leaf in members}
    pairs = [
        (leaf, theirs[leaf.checkpoint_name, leaf.name])
        for members in reference.layout().values()
        for leaf in members
        if (leaf.checkpoint_name, leaf.name) in theirs
    ]
    by_kind: dict[str, SquaredErrorSums] = defaultdict(SquaredErrorSums)
    by_layer: dict[str, dict[str, SquaredErrorSums]] = defaultdict(lambda: defaultdict(SquaredErrorSums))
    by_matrix: dict[str, float | None] = {}
    total = sum(reference.nbytes(leaf) + other.nbytes(match) for leaf, match in pairs)
    with progress_bar("comparing weights", total, show=progress) as advance:
        for leaf, match in pairs:
            squares = _sum_squared_errors(
                reference.iter_chunks(leaf), other.iter_chunks(match), f"{leaf.checkpoint_name} {leaf.name}"
            )
            kind = weight_kind(leaf)
            by_kind[kind].add(squares)
            by_layer[leaf.checkpoint_name][kind].add(squares)
            by_layer[leaf.checkpoint_name]["all"].add(squares)
            by_matrix[f"{leaf.checkpoint_name}/{leaf.name}"] = squares.relative_error
            advance(reference.nbytes(leaf) + other.nbytes(match))
    return {
        "by_kind": {kind: by_kind[kind].relative_error for kind in WEIGHT_KINDS if kind in by_kind},
        "by_layer": {part: {k: s.relative_error for k, s in kinds.items()} for part, kinds in by_layer.items()},
        "by_matrix": by_matrix,
    }


def _sum_squared_errors(
    reference: Iterator[tuple[int, WeightChunk]], other: Iterator[tuple[int, WeightChunk]], name: str
) -> SquaredErrorSums:
    total = SquaredErrorSums()
    for ours, theirs in _aligned_row_blocks(reference, other):
        weight = np.asarray(ours, np.float32).ravel()
        error = weight - np.asarray(theirs, np.float32).ravel()
        total.add(SquaredErrorSums(float(np.dot(error, error)), float(np.dot(weight, weight))))
    if not math.isfinite(total.error_sum_sq + total.weight_sum_sq):
        raise CheckpointError(f"{name} holds NaN or infinite weights: `python -m convert SRC DST --check` finds all")
    return total


def _aligned_row_blocks(
    reference: Iterator[tuple[int, WeightChunk]], other: Iterator[tuple[int, WeightChunk]]
) -> Iterator[tuple[Any, Any]]:
    """The same rows of two arrays that come in pieces of different heights, a block at a time."""
    theirs: Any = ()
    for _, piece in reference:
        ours = to_plain_array(piece)
        height = max(1, _BLOCK_VALUES * len(ours) // max(1, ours.size))
        while len(ours):
            if not len(theirs):
                theirs = to_plain_array(next(other)[1])
            rows = min(len(ours), len(theirs), height)
            yield ours[:rows], theirs[:rows]
            ours, theirs = ours[rows:], theirs[rows:]
