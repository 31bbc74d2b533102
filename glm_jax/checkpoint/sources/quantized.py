"""Any source with its matrices quantized anew, one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.sources.base import WeightChunk, WeightSource, to_plain_array
from glm_jax.checkpoint.sources.synthetic import SyntheticSource
from glm_jax.errors import CheckpointError
from glm_jax.sharding import Rules
from glm_jax.weights import QuantizedTensor, QuantRules, QuantSpec, quantize
from glm_jax.weights.params import ParamPath
from glm_jax.weights.quantization import QuantMethod
from glm_jax.weights.storage import Storage, plan_storage

_BLOCK_VALUES = 1 << 23  # quantized together: the search holds a few float32 copies of them


class RequantizedSource(WeightSource):
    """Weights of another source, quantized by rules on JAX's default device.

    Args:
        base: the source; where it is quantized itself, its values are taken.
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
        quant_rules: QuantRules,
        method: QuantMethod = "mse",
        *,
        rules: Rules = Rules(),
        axis_sizes: Mapping[str, int] | None = None,
        dtype: Any = "bfloat16",
        exclude: Collection[ParamPath] = (),
    ) -> None:
        self._base, self._dtype = base, jnp.dtype(dtype)
        self._method: QuantMethod = method
        self.cfg = base.cfg.replace(run_starts=())
        planned, notes = plan_storage(self.cfg, quant_rules, rules, axis_sizes)
        self._storage = Storage(tuple((path, spec) for path, spec in planned.specs if path not in exclude))
        if kept := ["/".join(path) for path, _ in planned.specs if path in exclude]:
            notes = (*notes, f"not quantized, because the destination cannot hold it so: {', '.join(kept)}")
        self._leaves = {
            (leaf.checkpoint_name, leaf.name): leaf for members in base.layout().values() for leaf in members
        }
        self.hf_config = base.hf_config
        if any(base.quant_spec(leaf) for leaf in self._leaves.values()):
            notes = ("the source is quantized: its values are quantized again, which loses a little more", *notes)
        self.info = dataclasses.replace(base.info, notes=(*base.info.notes, *notes))

    def unquantized(self) -> WeightSource:
        """The source of the values."""
        return self._base

    def fingerprint(self) -> str:
        """Of the base and of everything that decides the codes."""
        specs = [["/".join(path), spec.to_json()] for path, spec in self._storage.specs]
        text = json.dumps([self._base.fingerprint(), specs, self._method, self._dtype.name])
        return hashlib.sha256(text.encode()).hexdigest()

    def mtimes_ns(self) -> Mapping[str, int]:
        """Of the base."""
        return self._base.mtimes_ns()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Of the base."""
        return self._base.dtype(self.base_leaf(leaf))

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """By the rules."""
        return self._storage.get(leaf.param_path)

    def base_leaf(self, leaf: Leaf) -> Leaf:
        """The same array in the base, whose runs may be others."""
        return self._leaves[leaf.checkpoint_name, leaf.name]

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """The base's, quantized where the rules say so."""
        spec, theirs = self.quant_spec(leaf), self.base_leaf(leaf)
        if spec is None:
            for row, piece in self._base.iter_chunks(theirs, start, stop):
                yield row, to_plain_array(piece)
            return
        for row, piece in self._iter_values(theirs, start, stop):
            for at, block in iter_row_blocks(piece, spec):
                require_finite(block, theirs)
                yield row + at, self.quantize_chunk(block, spec)

    def quantize_chunk(self, values: Any, spec: QuantSpec) -> QuantizedTensor:
        """One matrix, or rows of one, or a stack."""
        return quantize(jnp.asarray(values), spec, self._method, self._dtype)

    def _iter_values(self, leaf: Leaf, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
        if isinstance(self._base, SyntheticSource):
            yield from self._base.iter_device_chunks(leaf, start, stop)
            return
        for row, piece in self._base.iter_chunks(leaf, start, stop):
            yield row, to_plain_array(piece)


def require_finite(values: Any, leaf: Leaf) -> None:
    """Integers cannot stand for NaN and infinity, and must not hide them.

    Raises:
        CheckpointError: naming the array.
    """
    if not bool(jnp.isfinite(jnp.max(jnp.abs(jnp.asarray(values))))):
        raise CheckpointError(
            f"{leaf.checkpoint_name}/{leaf.name} holds weights that are NaN or infinite, which cannot be quantized: "
            "the checkpoint is damaged"
        )


def iter_row_blocks(chunk: Any, spec: QuantSpec) -> Iterator[tuple[int, Any]]:
    """A piece cut into rows (of a matrix, or matrices of a stack) that are small enough to work on at once."""
    if chunk.ndim == 2 and spec.block[0] != 1:
        yield 0, chunk
        return
    rows = max(1, _BLOCK_VALUES * len(chunk) // max(1, chunk.size))
    yield from ((at, chunk[at : at + rows]) for at in range(0, len(chunk), rows))
