"""bfloat16 matrices as CPUs hold them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

from glm_jax.sharding import LogicalAxis
from glm_jax.weights.dense_matmul import dense_matmul
from glm_jax.weights.indexing import Index, take_slice
from glm_jax.weights.quant_spec import QuantSpec
from glm_jax.weights.weight_matrix import StoredArray, WeightMatrix
from pallas_kernels.tiles import Tiles, make_tiles


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class Bfloat16Bits(WeightMatrix):
    """bfloat16 values held as 16-bit integers, the layout for CPUs.

    ``value = bitcast_float32(uint32(bits) << 16)``, exactly.

    XLA:CPU computes bfloat16 products in float32, and widens a whole stack of weights ahead of the loop that reads one
    slice of it at a time (three times the memory, a tenth of the speed). Integers are sliced first.

    Attributes:
        bits: ``uint16 [*stack, O, I]``.
    """

    bits: jax.Array

    @classmethod
    def from_array(cls, values: npt.StoredArray) -> Bfloat16Bits:
        """Holds a bfloat16 array (NumPy or JAX) as bits, without changing a value."""
        return cls(jnp.asarray(np.asarray(values, ml_dtypes.bfloat16).view(np.uint16)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.bits.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """bfloat16, the dtype of the values that the bits represent."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Sharding of the bits."""
        return self.bits.sharding

    def components(self) -> dict[str, StoredArray]:
        """The bits, under the empty name."""
        return {"": self.bits}

    def map_components(self, function: Callable[[str, StoredArray], Any]) -> Bfloat16Bits:
        """A weight with the bits ``function("", bits)``."""
        return Bfloat16Bits(function("", self.bits))

    def map_axes(self, axes: Sequence[LogicalAxis | None], function: Callable[..., Any]) -> Bfloat16Bits:
        """``function(*axes)`` in place of the bits, which have the axes of the weight."""
        return Bfloat16Bits(function(*axes))

    def to_float32(self) -> jax.Array:
        """The values as float32, for use inside ``jit``."""
        return jax.lax.bitcast_convert_type(self.bits.astype(jnp.uint32) << 16, jnp.float32)

    def values(self, index: tuple[Index, ...] = ()) -> jax.Array:
        """``weight[index]`` in float32; the bits are sliced before they are widened."""
        return Bfloat16Bits(take_slice(self.bits, index)).to_float32()

    def matmul(self, rows: jax.Array, index: tuple[Index, ...]) -> jax.Array:
        """``rows @ weight[index].T`` in float32."""
        return dense_matmul(rows, self.values(index), index)

    def gather(self, rows: jax.Array) -> jax.Array:
        """Rows of a matrix in float32."""
        return Bfloat16Bits(self.bits[rows]).to_float32()

    def can_tile(self, *, transposed: bool) -> bool:
        """True: tiles hold any bfloat16 matrix."""
        del transposed
        return True

    def to_tiles(self, *, transposed: bool) -> tuple[Tiles, QuantSpec | None]:
        """Tiles that hold the bits."""
        return make_tiles(jnp.swapaxes(self.bits, -1, -2) if transposed else self.bits, "bfloat16"), None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array of bfloat16 (or ``dtype``)."""
        values = np.asarray(self.bits).view(ml_dtypes.bfloat16)
        return values if dtype is None else values.astype(dtype)
