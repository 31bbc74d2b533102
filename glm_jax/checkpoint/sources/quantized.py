"""Any source with its matrices quantised anew, one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.sources.base import Piece, WeightSource, plain
from glm_jax.checkpoint.sources.synthetic import SyntheticSource
from glm_jax.errors import CheckpointError
from glm_jax.sharding import Rules
from glm_jax.weights import QuantizedTensor, QuantRules, QuantSpec, quantize
from glm_jax.weights.params import Path
from glm_jax.weights.quantization import Method
from glm_jax.weights.storage import Storage, plan_storage

_BLOCK_VALUES = 1 << 23  # quantised together: the search holds a few float32 copies of them


class Requantised(WeightSource):
    """Weights of another source, quantised by rules on JAX's default device.

    Args:
        base: the source; where it is quantised itself, its values are taken.
        quant: the rules.
        method: how scales are found.
        rules: mesh axis of each logical axis, so that groups do not cross from one device to the next.
        axis_sizes: devices along each mesh axis.
        dtype: of the model.
        keep: paths of parameters that stay as they are, whatever the rules say.
    """

    def __init__(
        self,
        base: WeightSource,
        quant: QuantRules,
        method: Method = "mse",
        *,
        rules: Rules = Rules(),
        axis_sizes: Mapping[str, int] | None = None,
        dtype: Any = "bfloat16",
        keep: Collection[Path] = (),
    ) -> None:
        self._base, self._dtype = base, jnp.dtype(dtype)
        self._method: Method = method
        self.cfg = base.cfg.replace(run_starts=())
        planned, notes = plan_storage(self.cfg, quant, rules, axis_sizes)
        self._storage = Storage(tuple((path, spec) for path, spec in planned.specs if path not in keep))
        if kept := ["/".join(path) for path, _ in planned.specs if path in keep]:
            notes = (*notes, f"not quantised, because the destination cannot hold it so: {', '.join(kept)}")
        self._leaves = {(leaf.part, leaf.name): leaf for members in base.layout().values() for leaf in members}
        self.hf_config = base.hf_config
        if any(base.storage(leaf) for leaf in self._leaves.values()):
            notes = ("the source is quantised: its values are quantised again, which loses a little more", *notes)
        self.info = dataclasses.replace(base.info, notes=(*base.info.notes, *notes))

    def unquantized(self) -> WeightSource:
        """The source of the values."""
        return self._base

    def fingerprint(self) -> str:
        """Of the base and of everything that decides the codes."""
        specs = [["/".join(path), spec.to_json()] for path, spec in self._storage.specs]
        text = json.dumps([self._base.fingerprint(), specs, self._method, self._dtype.name])
        return hashlib.sha256(text.encode()).hexdigest()

    def modified(self) -> Mapping[str, int]:
        """Of the base."""
        return self._base.modified()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Of the base."""
        return self._base.dtype(self.base_leaf(leaf))

    def storage(self, leaf: Leaf) -> QuantSpec | None:
        """By the rules."""
        return self._storage.get(leaf.target)

    def base_leaf(self, leaf: Leaf) -> Leaf:
        """The same array in the base, whose runs may be others."""
        return self._leaves[leaf.part, leaf.name]

    def pieces(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Piece]]:
        """The base's, quantised where the rules say so."""
        spec, theirs = self.storage(leaf), self.base_leaf(leaf)
        if spec is None:
            for row, piece in self._base.pieces(theirs, start, stop):
                yield row, plain(piece)
            return
        for row, piece in self._values(theirs, start, stop):
            for at, block in blocks(piece, spec):
                refuse_not_finite(block, theirs)
                yield row + at, self.quantized(block, spec)

    def quantized(self, values: Any, spec: QuantSpec) -> QuantizedTensor:
        """One matrix, or rows of one, or a stack."""
        return quantize(jnp.asarray(values), spec, self._method, self._dtype)

    def _values(self, leaf: Leaf, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
        if isinstance(self._base, SyntheticSource):
            yield from self._base.drawn(leaf, start, stop)
            return
        for row, piece in self._base.pieces(leaf, start, stop):
            yield row, plain(piece)


def refuse_not_finite(values: Any, leaf: Leaf) -> None:
    """Integers cannot stand for NaN and infinity, and must not hide them.

    Raises:
        CheckpointError: naming the array.
    """
    if not bool(jnp.isfinite(jnp.max(jnp.abs(jnp.asarray(values))))):
        raise CheckpointError(
            f"{leaf.part}/{leaf.name} holds weights that are NaN or infinite, which cannot be quantised: "
            "the checkpoint is damaged"
        )


def blocks(piece: Any, spec: QuantSpec) -> Iterator[tuple[int, Any]]:
    """A piece cut into rows (of a matrix, or matrices of a stack) that are small enough to work on at once."""
    if piece.ndim == 2 and spec.block[0] != 1:
        yield 0, piece
        return
    rows = max(1, _BLOCK_VALUES * len(piece) // max(1, piece.size))
    yield from ((at, piece[at : at + rows]) for at in range(0, len(piece), rows))
