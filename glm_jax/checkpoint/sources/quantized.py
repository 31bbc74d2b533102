"""A source that quantizes the matrices of another source, one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from glm_jax.checkpoint.finiteness import require_finite
from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.sources.base import WeightChunk, WeightSource
from glm_jax.checkpoint.sources.build import to_plain_array
from glm_jax.checkpoint.sources.synthetic import SyntheticSource
from glm_jax.sharding import Rules
from glm_jax.weights import QuantizedTensor, QuantRules, QuantSpec, quantize
from glm_jax.weights.params import ParamPath
from glm_jax.weights.quantization import QuantMethod
from glm_jax.weights.storage import Storage, plan_storage

FloatArray = np.ndarray[Any, np.dtype[Any]] | jax.Array
_BLOCK_VALUES = 1 << 23  # quantized at once; the search holds a few float32 copies


class RequantizedSource(WeightSource):
    """Weights of another source, quantized on JAX's default device.

    Args:
        base: Source of the values; weights that it holds quantized are dequantized first.
        quant_rules: Quantization of each kind of matrix.
        method: Method of choosing the scales.
        rules: Mesh axis of each logical axis; no quantization group crosses the boundary between two devices.
        axis_sizes: Number of devices along each mesh axis.
        dtype: Dtype of the model.
        exclude: Paths of parameters that are never quantized, whatever ``quant_rules`` says.
    """

    def __init__(
        self,
        base: WeightSource,
        quant_rules: QuantRules,
        method: QuantMethod = "mse",
        *,
        rules: Rules = Rules(),
        axis_sizes: Mapping[str, int] | None = None,
        dtype: DTypeLike = "bfloat16",
        exclude: Collection[ParamPath] = (),
    ) -> None:
        self._base, self._dtype = base, jnp.dtype(dtype)
        self._method: QuantMethod = method
        self.cfg = base.cfg.replace(run_starts=())
        planned, notes = plan_storage(self.cfg, quant_rules, rules, axis_sizes)
        self._storage = Storage(tuple((path, spec) for path, spec in planned.specs if path not in exclude))
        if excluded := ["/".join(path) for path, _ in planned.specs if path in exclude]:
            notes = (*notes, f"not quantized, because the destination cannot hold it quantized: {', '.join(excluded)}")
        self._leaves = {
            (leaf.checkpoint_name, leaf.name): leaf for members in base.layout().values() for leaf in members
        }
        self.hf_config = base.hf_config
        if any(base.quant_spec(leaf) for leaf in self._leaves.values()):
            notes = ("the source is quantized: its values are quantized again, which loses a little more", *notes)
        self.info = dataclasses.replace(base.info, notes=(*base.info.notes, *notes))

    def unquantized(self) -> WeightSource:
        """Returns the base source."""
        return self._base

    def fingerprint(self) -> str:
        """Returns a hash of the base's fingerprint and of all settings that affect the quantized values."""
        specs = [["/".join(path), spec.to_json()] for path, spec in self._storage.specs]
        text = json.dumps([self._base.fingerprint(), specs, self._method, self._dtype.name])
        return hashlib.sha256(text.encode()).hexdigest()

    def mtimes_ns(self) -> Mapping[str, int]:
        """Returns the modification times of the base's files in nanoseconds."""
        return self._base.mtimes_ns()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Returns the array's dtype in the base."""
        return self._base.dtype(self.base_leaf(leaf))

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """Returns the storage that the quantization rules give the array."""
        return self._storage.get(leaf.param_path)

    def base_leaf(self, leaf: Leaf) -> Leaf:
        """Returns the same array in the base, whose layer groups may differ."""
        return self._leaves[leaf.checkpoint_name, leaf.name]

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields the base's values, quantized where the rules say so."""
        spec, base_leaf = self.quant_spec(leaf), self.base_leaf(leaf)
        if spec is None:
            for row, chunk in self._base.iter_chunks(base_leaf, start, stop):
                yield row, to_plain_array(chunk)
            return
        for row, chunk in self._iter_values(base_leaf, start, stop):
            for offset, block in _iter_row_blocks(chunk, spec):
                require_finite(block, base_leaf)
                yield row + offset, self.quantize_chunk(block, spec)

    def quantize_chunk(self, values: FloatArray, spec: QuantSpec) -> QuantizedTensor:
        """Quantizes one matrix, rows of one, or a stack of matrices: float ``[*stack, O, I]``."""
        return quantize(jnp.asarray(values), spec, self._method, self._dtype)

    def _iter_values(self, base_leaf: Leaf, start: int, stop: int | None) -> Iterator[tuple[int, FloatArray]]:
        """Yields (first row, unquantized rows) of an array of the base."""
        if isinstance(self._base, SyntheticSource):  # its device samples need no copy to the device
            yield from self._base.iter_device_chunks(base_leaf, start, stop)
            return
        for row, chunk in self._base.iter_chunks(base_leaf, start, stop):
            yield row, to_plain_array(chunk)


def _iter_row_blocks(chunk: FloatArray, spec: QuantSpec) -> Iterator[tuple[int, FloatArray]]:
    """Splits a chunk into blocks of rows (or of matrices, for a stack) that are small enough to quantize at once."""
    if chunk.ndim == 2 and spec.block[0] != 1:
        yield 0, chunk
        return
    rows = max(1, _BLOCK_VALUES * len(chunk) // max(1, chunk.size))
    yield from ((start, chunk[start : start + rows]) for start in range(0, len(chunk), rows))
