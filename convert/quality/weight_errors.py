"""Sizes of two models, and the relative errors of their weights, matrix by matrix."""

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
from glm_jax.checkpoint.sources.base import Array, WeightChunk, WeightSource
from glm_jax.checkpoint.sources.build import to_plain_array
from glm_jax.checkpoint.sources.storage import source_storage
from glm_jax.errors import CheckpointError
from glm_jax.weights.params import is_matrix, leaves_with_path, param_specs
from glm_jax.weights.storage import abstract_params

_BLOCK_VALUES = 1 << 20  # values compared at once, in float32

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
    """Sums of squares of the errors and of the reference weights."""

    error_sum_sq: float = 0.0
    weight_sum_sq: float = 0.0

    def add(self, other: SquaredErrorSums) -> None:
        """Adds the sums of other matrices."""
        self.error_sum_sq += other.error_sum_sq
        self.weight_sum_sq += other.weight_sum_sq

    @property
    def relative_error(self) -> float | None:
        """Relative error ``||W - W'|| / ||W||``; ``None`` if W is zero and W' is not."""
        if not self.weight_sum_sq:
            return None if self.error_sum_sq else 0.0
        return math.sqrt(self.error_sum_sq / self.weight_sum_sq)


def weight_kind(leaf: Leaf) -> str:
    """Returns the kind of an array, one of :data:`WEIGHT_KINDS`."""
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
    """Returns bytes and parameter counts of a loaded model, separately for the main model and the prediction layer.

    Args:
        source: The weights.
        dtype: Dtype of parameters that are not quantized and have no fixed dtype.
    """
    totals = {name: {"parameters": 0, "bytes": 0} for name in ("main", "mtp")}
    params = dict(leaves_with_path(abstract_params(source.cfg, dtype, storage=source_storage(source))))
    for path, spec in leaves_with_path(param_specs(source.cfg)):
        total = totals["mtp" if path[0] == MTP else "main"]
        total["parameters"] += spec.size
        total["bytes"] += sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params[path]))
    main = totals["main"]
    return {**totals, "bits_per_weight": 8 * main["bytes"] / main["parameters"]}


def weight_errors(reference: WeightSource, other: WeightSource, *, progress: bool = False) -> dict[str, Any]:
    """Returns relative errors ``||W - W'||_F / ||W||_F`` of every matrix, of every kind and of every layer.

    Holds a few million values of each model at a time. Weights that only one of the models has, such as a prediction
    layer, are ignored.

    Args:
        reference: Source of W.
        other: Source of W'.
        progress: Whether to show progress on stderr.

    Raises:
        CheckpointError: if a weight is NaN or infinite, or bytes are missing.
    """
    other_leaves = {(leaf.checkpoint_name, leaf.name): leaf for members in other.layout().values() for leaf in members}
    pairs = [
        (leaf, other_leaves[leaf.checkpoint_name, leaf.name])
        for members in reference.layout().values()
        for leaf in members
        if (leaf.checkpoint_name, leaf.name) in other_leaves
    ]
    by_kind: dict[str, SquaredErrorSums] = defaultdict(SquaredErrorSums)
    by_layer: dict[str, dict[str, SquaredErrorSums]] = defaultdict(lambda: defaultdict(SquaredErrorSums))
    by_matrix: dict[str, float | None] = {}
    total = sum(reference.nbytes(leaf) + other.nbytes(match) for leaf, match in pairs)
    with progress_bar("comparing weights", total, show=progress) as advance:
        for leaf, match in pairs:
            sums = _sum_squared_errors(
                reference.iter_chunks(leaf), other.iter_chunks(match), f"{leaf.checkpoint_name} {leaf.name}"
            )
            kind = weight_kind(leaf)
            by_kind[kind].add(sums)
            by_layer[leaf.checkpoint_name][kind].add(sums)
            by_layer[leaf.checkpoint_name]["all"].add(sums)
            by_matrix[f"{leaf.checkpoint_name}/{leaf.name}"] = sums.relative_error
            advance(reference.nbytes(leaf) + other.nbytes(match))
    return {
        "by_kind": {kind: by_kind[kind].relative_error for kind in WEIGHT_KINDS if kind in by_kind},
        "by_layer": {layer: {k: s.relative_error for k, s in kinds.items()} for layer, kinds in by_layer.items()},
        "by_matrix": by_matrix,
    }


def _sum_squared_errors(
    reference: Iterator[tuple[int, WeightChunk]], other: Iterator[tuple[int, WeightChunk]], name: str
) -> SquaredErrorSums:
    total = SquaredErrorSums()
    for rows, other_rows in _aligned_row_blocks(reference, other):
        weight = np.asarray(rows, np.float32).ravel()
        error = weight - np.asarray(other_rows, np.float32).ravel()
        total.add(SquaredErrorSums(float(np.dot(error, error)), float(np.dot(weight, weight))))
    if not math.isfinite(total.error_sum_sq + total.weight_sum_sq):
        raise CheckpointError(f"{name} holds NaN or infinite weights: `python -m convert SRC DST --check` finds all")
    return total


def _aligned_row_blocks(
    reference: Iterator[tuple[int, WeightChunk]], other: Iterator[tuple[int, WeightChunk]]
) -> Iterator[tuple[Array, Array]]:
    """Yields the same rows of two arrays, block by block, although their chunks differ in size."""
    other_rows = np.empty(0)
    for _, chunk in reference:
        rows = to_plain_array(chunk)
        block_size = max(1, _BLOCK_VALUES * len(rows) // max(1, rows.size))
        while len(rows):
            if not len(other_rows):
                other_rows = to_plain_array(next(other)[1])
            count = min(len(rows), len(other_rows), block_size)
            yield rows[:count], other_rows[:count]
            rows, other_rows = rows[count:], other_rows[count:]
