"""Checks of weights' values, made on request: they read every byte."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.folder.manifest import DTYPES
from glm_jax.checkpoint.progress import Advance
from glm_jax.checkpoint.safetensors.reader import listing
from glm_jax.checkpoint.sources.base import Piece, WeightSource
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor
from glm_jax.weights.quantized_tensor import COMPONENTS

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 22  # values looked at together


class Checker:
    """Collects arrays with values that are not finite, or whose bytes are not those of the manifest.

    Feed it every piece of every array, in order.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._bad: list[str] = []
        self._hashes: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def piece(self, leaf: Leaf, piece: Piece) -> None:
        """Looks at the next rows of an array."""
        if isinstance(piece, QuantizedTensor):
            for name, array in piece.components().items():
                self._look(leaf, name, np.asarray(array))
        else:
            self._look(leaf, "", piece)

    def _look(self, leaf: Leaf, component: str, piece: Array) -> None:
        key = array_name(leaf, component)
        if count := _not_finite(piece):
            self._counts[key] = self._counts.get(key, 0) + count
        if self._source.sha256(leaf, component) is not None:
            digest = self._hashes.setdefault(key, hashlib.sha256())
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def close(self, leaf: Leaf) -> None:
        """Says that an array is complete."""
        for component in ("", *COMPONENTS):
            digest = self._hashes.pop(array_name(leaf, component), None)
            if digest is not None and digest.hexdigest() != self._source.sha256(leaf, component):
                self._bad.append(array_name(leaf, component))

    def finish(self) -> None:
        """Reports everything that was found.

        Raises:
            CheckpointError: listing the arrays.
        """
        problems = []
        if self._bad:
            problems.append(f"arrays whose bytes are not those of the manifest: {listing(self._bad)}")
        if self._counts:
            items = [f"{key} ({count})" for key, count in self._counts.items()]
            problems.append(f"weights that are NaN or infinite: {listing(items)}")
        if problems:
            raise CheckpointError(f"{self._source.info.name}: {'; '.join(problems)}")


def check_finite(source: WeightSource, advance: Advance) -> None:
    """Reads all weights.

    Raises:
        CheckpointError: listing the arrays that hold NaN or infinite values, or differ from their manifest.
    """
    checker = Checker(source)
    for leaves in source.layout().values():
        for leaf in leaves:
            for _, piece in source.pieces(leaf):
                checker.piece(leaf, piece)
                advance(piece.size * source.dtype(leaf).itemsize)
            checker.close(leaf)
    checker.finish()


def array_name(leaf: Leaf, component: str) -> str:
    """Part and name of an array on disk: a quantised weight has several."""
    return f"{leaf.part}/{leaf.name}" + (f".{component}" if component else "")


def _not_finite(piece: Array) -> int:
    if not np.issubdtype(piece.dtype, np.inexact) and piece.dtype != DTYPES["bfloat16"]:
        return 0
    piece = np.atleast_1d(piece)
    rows = max(1, _BLOCK * len(piece) // max(1, piece.size))
    blocks = (piece[at : at + rows] for at in range(0, len(piece), rows))
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)
