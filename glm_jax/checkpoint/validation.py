"""Checks of the weights' values and bytes; they read every byte, and run on request."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from glm_jax.checkpoint.finiteness import count_nonfinite
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.messages import format_names
from glm_jax.checkpoint.progress import ProgressCallback
from glm_jax.checkpoint.sources.base import WeightChunk, WeightSource
from glm_jax.errors import CheckpointError
from glm_jax.weights import as_weight_matrix
from glm_jax.weights.quantized_tensor import COMPONENTS

Array = np.ndarray[Any, np.dtype[Any]]


class WeightValidator:
    """Collects arrays that hold values that are not finite, or whose bytes differ from the manifest's hash.

    Expects every chunk of every array, in order.

    Args:
        source: Source of the arrays.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._mismatched: list[str] = []
        self._hashes: dict[str, Any] = {}
        self._nonfinite_counts: dict[str, int] = {}

    def check_chunk(self, leaf: Leaf, chunk: WeightChunk) -> None:
        """Checks the next rows of an array."""
        for name, array in as_weight_matrix(chunk).components().items():
            self._check_array(leaf, name, np.asarray(array))

    def _check_array(self, leaf: Leaf, component: str, rows: Array) -> None:
        key = disk_array_name(leaf, component)
        if count := count_nonfinite(rows):
            self._nonfinite_counts[key] = self._nonfinite_counts.get(key, 0) + count
        if self._source.sha256(leaf, component) is not None:
            digest = self._hashes.setdefault(key, hashlib.sha256())
            digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)

    def end_array(self, leaf: Leaf) -> None:
        """Compares the hash of a complete array with the manifest."""
        for component in ("", *COMPONENTS):
            digest = self._hashes.pop(disk_array_name(leaf, component), None)
            if digest is not None and digest.hexdigest() != self._source.sha256(leaf, component):
                self._mismatched.append(disk_array_name(leaf, component))

    def raise_problems(self) -> None:
        """Reports all problems.

        Raises:
            CheckpointError: if there are any; lists the arrays.
        """
        problems = []
        if self._mismatched:
            problems.append(f"arrays whose bytes are not those of the manifest: {format_names(self._mismatched)}")
        if self._nonfinite_counts:
            items = [f"{key} ({count})" for key, count in self._nonfinite_counts.items()]
            problems.append(f"weights that are NaN or infinite: {format_names(items)}")
        if problems:
            raise CheckpointError(f"{self._source.info.name}: {'; '.join(problems)}")


def validate_weights(source: WeightSource, advance: ProgressCallback) -> None:
    """Reads and checks all weights.

    Args:
        source: The weights.
        advance: Callback that receives the bytes of each checked chunk.

    Raises:
        CheckpointError: if arrays hold NaN or infinite values, or differ from their manifest; lists them all.
    """
    validator = WeightValidator(source)
    for leaves in source.layout().values():
        for leaf in leaves:
            for _, chunk in source.iter_chunks(leaf):
                validator.check_chunk(leaf, chunk)
                advance(chunk.size * source.dtype(leaf).itemsize)
            validator.end_array(leaf)
    validator.raise_problems()


def disk_array_name(leaf: Leaf, component: str) -> str:
    """Returns the name of an array on disk, such as ``layer-00001/moe.gate.codes``; ``component`` is "" if plain."""
    return f"{leaf.checkpoint_name}/{leaf.name}" + (f".{component}" if component else "")
