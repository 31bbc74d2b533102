"""Checks of weights' values, made on request: they read every byte."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.messages import format_names
from glm_jax.checkpoint.progress import ProgressCallback
from glm_jax.checkpoint.sources.base import WeightChunk, WeightSource
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor
from glm_jax.weights.quantized_tensor import COMPONENTS

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 22  # values looked at together


class WeightValidator:
    """Collects arrays with values that are not finite, or whose bytes are not those of the manifest.

    Feed it every piece of every array, in order.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._mismatched: list[str] = []
        self._hashes: dict[str, Any] = {}
        self._nonfinite_counts: dict[str, int] = {}

    def check_chunk(self, leaf: Leaf, chunk: WeightChunk) -> None:
        """Looks at the next rows of an array."""
        if isinstance(chunk, QuantizedTensor):
            for name, array in chunk.components().items():
                self._check_array(leaf, name, np.asarray(array))
        else:
            self._check_array(leaf, "", chunk)

    def _check_array(self, leaf: Leaf, component: str, piece: Array) -> None:
        key = disk_array_name(leaf, component)
        if count := _count_nonfinite(piece):
            self._nonfinite_counts[key] = self._nonfinite_counts.get(key, 0) + count
        if self._source.sha256(leaf, component) is not None:
            digest = self._hashes.setdefault(key, hashlib.sha256())
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def end_array(self, leaf: Leaf) -> None:
        """Says that an array is complete."""
        for component in ("", *COMPONENTS):
            digest = self._hashes.pop(disk_array_name(leaf, component), None)
            if digest is not None and digest.hexdigest() != self._source.sha256(leaf, component):
                self._mismatched.append(disk_array_name(leaf, component))

    def raise_problems(self) -> None:
        """Reports everything that was found.

        Raises:
            CheckpointError: listing the arrays.
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
    """Reads all weights.

    Raises:
        CheckpointError: listing the arrays that hold NaN or infinite values, or differ from their manifest.
    """
    checker = WeightValidator(source)
    for leaves in source.layout().values():
        for leaf in leaves:
            for _, piece in source.iter_chunks(leaf):
                checker.check_chunk(leaf, piece)
                advance(piece.size * source.dtype(leaf).itemsize)
            checker.end_array(leaf)
    checker.raise_problems()


def disk_array_name(leaf: Leaf, component: str) -> str:
    """Part and name of an array on disk: a quantized weight has several."""
    return f"{leaf.checkpoint_name}/{leaf.name}" + (f".{component}" if component else "")


def _count_nonfinite(piece: Array) -> int:
    if not np.issubdtype(piece.dtype, np.inexact) and piece.dtype != FLOAT_DTYPES["bfloat16"]:
        return 0
    piece = np.atleast_1d(piece)
    rows = max(1, _BLOCK * len(piece) // max(1, piece.size))
    blocks = (piece[at : at + rows] for at in range(0, len(piece), rows))
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)
