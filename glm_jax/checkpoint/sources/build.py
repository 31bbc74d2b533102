"""Assembles the chunks of a source into whole arrays."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from glm_jax.checkpoint.folder.layout import DiskArray, Leaf, disk_arrays
from glm_jax.checkpoint.sources.base import Array, WeightChunk, WeightSource


def to_plain_array(chunk: WeightChunk) -> Array:
    """Returns a chunk's values as an array; quantized chunks are dequantized to float32."""
    return np.asarray(chunk)


def build_array(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any] | None = None) -> Array:
    """Returns a whole array in C order, without a copy if the source yields it as one chunk.

    Args:
        source: The weights.
        leaf: The array.
        dtype: Dtype to convert to; ``None`` keeps the array's own.
    """
    output_dtype = source.output_dtype(leaf, dtype)
    out: Array | None = None
    for row, chunk in source.iter_chunks(leaf):
        chunk = to_plain_array(chunk)
        if chunk.shape == leaf.shape and chunk.dtype == output_dtype and chunk.flags.c_contiguous:
            return chunk
        out = np.empty(leaf.shape, output_dtype) if out is None else out
        out[row : row + len(chunk)] = chunk
    return np.empty(leaf.shape, output_dtype) if out is None else out


def build_disk_arrays(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any] | None = None) -> dict[DiskArray, Array]:
    """Returns the arrays that hold a leaf on disk, in C order: one, or the components of a quantized leaf.

    Args:
        source: The weights.
        leaf: The parameter of one layer.
        dtype: Dtype to convert a plain array to; ``None`` keeps its own.
    """
    spec = source.quant_spec(leaf)
    disk = disk_arrays(leaf, spec)
    if spec is None:
        return {disk[0]: np.ascontiguousarray(build_array(source, leaf, dtype))}
    arrays = {disk_array: np.empty(disk_array.shape, disk_array.dtype) for disk_array in disk}
    for row, chunk in source.iter_chunks(leaf):
        for disk_array, array in arrays.items():
            component = np.atleast_1d(np.asarray(getattr(chunk, disk_array.component)))
            # One row of scales, or one permutation, may apply to all rows of a matrix.
            start = row if len(array) == leaf.shape[0] else 0
            array[start : start + len(component)] = component
    return arrays


def dominant_dtype(source: WeightSource) -> str:
    """Returns the name of the dtype that most of a source's values have."""
    counts: Counter[str] = Counter()
    for members in source.layout().values():
        for leaf in members:
            counts[source.dtype(leaf).name] += math.prod(leaf.shape)
    return counts.most_common(1)[0][0]
