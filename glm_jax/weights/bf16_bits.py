"""bfloat16 matrices as CPUs hold them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class Bfloat16Bits:
    """bfloat16 values held as 16-bit integers, the layout for CPUs.

    ``value = bitcast_float32(uint32(bits) << 16)``, exactly.

    XLA:CPU computes bfloat16 products in float32, and widens a whole stack of weights ahead of the loop that reads one
    slice of it at a time (three times the memory, a tenth of the speed). Integers are sliced first.

    Attributes:
        bits: uint16, the shape of the weight.
    """

    bits: jax.Array

    @classmethod
    def from_array(cls, values: Any) -> Bfloat16Bits:
        """Holds a bfloat16 array (NumPy or JAX) as bits, without a change of value."""
        return cls(jnp.asarray(np.asarray(values, ml_dtypes.bfloat16).view(np.uint16)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.bits.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.bits.ndim

    @property
    def size(self) -> int:
        """Number of values."""
        return self.bits.size

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.bits.nbytes

    @property
    def dtype(self) -> Any:
        """The dtype of the values that the bits stand for."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def sharding(self) -> Any:
        """Where the bits live."""
        return self.bits.sharding

    def to_float32(self) -> jax.Array:
        """The values as float32, for use inside ``jit``."""
        return jax.lax.bitcast_convert_type(self.bits.astype(jnp.uint32) << 16, jnp.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array of bfloat16 (or ``dtype``)."""
        values = np.asarray(self.bits).view(ml_dtypes.bfloat16)
        return values if dtype is None else values.astype(dtype)
