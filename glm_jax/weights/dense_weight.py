"""A plain array as a weight matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.sharding import LogicalAxis
from glm_jax.weights.dense_matmul import dense_matmul
from glm_jax.weights.indexing import Index, take_slice
from glm_jax.weights.quant_spec import QuantSpec
from glm_jax.weights.weight_matrix import StoredArray, WeightMatrix
from pallas_kernels.tiles import Tiles, make_tiles

FLOAT_BITS_DTYPES = {"bfloat16": jnp.uint16, "float32": jnp.uint32}  # plain floats that tiles hold, as bit patterns


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class DenseWeight(WeightMatrix):
    """Wrapper of a plain array ``[*stack, O, I]``; parameter trees hold the array itself.

    Attributes:
        array: The values, in any float dtype.
    """

    array: StoredArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array."""
        return self.array.dtype

    @property
    def is_plain(self) -> bool:
        """True for a JAX array."""
        return isinstance(self.array, jax.Array)

    def components(self) -> dict[str, StoredArray]:
        """The array, under the empty name."""
        return {"": self.array}

    def map_components(self, function: Callable[[str, StoredArray], Any]) -> DenseWeight:
        """The wrapper of ``function("", array)``."""
        return DenseWeight(function("", self.array))

    def map_axes(self, axes: Sequence[LogicalAxis | None], function: Callable[..., Any]) -> Any:
        """``function(*axes)`` itself: in a tree of parameters the array has no wrapper."""
        return function(*axes)

    def values(self, index: tuple[Index, ...] = ()) -> jax.Array:
        """``array[index]`` in its own dtype."""
        return take_slice(self.array, index)

    def matmul(self, rows: jax.Array, index: tuple[Index, ...]) -> jax.Array:
        """``rows @ array[index].T`` in float32."""
        return dense_matmul(rows, self.values(index), index)

    def gather(self, rows: jax.Array) -> jax.Array:
        """``array[rows]``."""
        return self.array[rows]

    def can_tile(self, *, transposed: bool) -> bool:
        """Whether the dtype is bfloat16 or float32."""
        del transposed
        return jnp.dtype(self.dtype).name in FLOAT_BITS_DTYPES

    def to_tiles(self, *, transposed: bool) -> tuple[Tiles, QuantSpec | None]:
        """Tiles that hold the bit patterns of the floats."""
        kind: Any = jnp.dtype(self.dtype).name
        bits = jax.lax.bitcast_convert_type(self.array, FLOAT_BITS_DTYPES[kind])
        return make_tiles(jnp.swapaxes(bits, -1, -2) if transposed else bits, kind), None

    def as_param(self) -> jax.Array:
        """The array itself."""
        return self.array

    def untile(self) -> jax.Array:
        """The array itself."""
        return self.array

    def to_local(self) -> jax.Array:
        """The array itself."""
        return self.array


def as_weight_matrix(weight: WeightMatrix | StoredArray) -> WeightMatrix:
    """The one place that wraps parameters: plain arrays become :class:`DenseWeight`, others stay."""
    return weight if isinstance(weight, WeightMatrix) else DenseWeight(weight)
