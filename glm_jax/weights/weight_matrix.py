"""The interface of a weight: whatever stores it, operations multiply with it in the same way."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from glm_jax.sharding import LogicalAxis
from glm_jax.weights.dense_matmul import einsum_f32
from glm_jax.weights.indexing import Index
from glm_jax.weights.quant_spec import QuantSpec
from pallas_kernels.tiles import Tiles

StoredArray = Any  # np.ndarray, jax.Array or jax.ShapeDtypeStruct


class WeightMatrix(abc.ABC):
    """A matrix ``[*stack, O, I]`` in some storage, or a stack of them (layers, experts, heads).

    Subclasses are pytrees of their stored arrays. A new storage format is one new subclass; operations never ask for
    the class. Where an ``index`` has one entry per stack axis, it picks one matrix, and the product reads nothing
    but that matrix.

    LoRA would be a subclass that holds a base weight and adapters ``a [*stack, r, I]`` and ``b [*stack, O, r]``.
    ``matmul`` adds ``scale * (x @ a.T) @ b.T`` to the base's product, ``per_head_matmul`` the same per head, and
    ``values`` returns the merged matrix; ``components``, ``map_components``, ``map_axes``, ``to_local`` and ``gather``
    extend the base's. With ``is_tiled`` False, the fused decode step declines the model's layers and the reference
    runs them. The setter of ``LLM.params`` is the way in.
    """

    __slots__ = ()

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, not of its stored arrays."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values where they are plain floats, else that of the model."""

    @property
    def ndim(self) -> int:
        """Number of dimensions of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(array.nbytes for array in self.components().values())

    @property
    def quant_spec(self) -> QuantSpec | None:
        """Quantization of the values; None for plain floats."""
        return None

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a plain array, from which XLA multiplies a whole stack without a copy."""
        return False

    @property
    def is_tiled(self) -> bool:
        """Whether the weight is stored in the tiles that kernels read."""
        return False

    @property
    def runs_in_kernels(self) -> bool:
        """Whether hand-written kernels of this process multiply with this weight."""
        return False

    @property
    def kernel_tiles(self) -> Tiles | None:
        """The stored tiles where kernels multiply with them as they are; None elsewhere."""
        return None

    @abc.abstractmethod
    def components(self) -> dict[str, StoredArray]:
        """The stored arrays by name; an array that holds all values by itself has the empty name."""

    @abc.abstractmethod
    def map_components(self, function: Callable[[str, StoredArray], Any]) -> Self:
        """The same weight with ``function(name, array)`` in place of each stored array."""

    @abc.abstractmethod
    def map_axes(
        self, axes: Sequence[LogicalAxis | None], function: Callable[..., Any]
    ) -> WeightMatrix | Any:  # a plain array's result is that of ``function``
        """The same weight with ``function(*component_axes)`` in place of each stored array.

        Args:
            axes: Logical axis of each dimension of the weight.
            function: Called with the logical axes of one stored array.
        """

    @abc.abstractmethod
    def values(self, index: tuple[Index, ...] = ()) -> jax.Array:
        """``weight[index]`` as an array to compute with: float32 unless plain values are stored in another dtype."""

    @abc.abstractmethod
    def matmul(self, rows: jax.Array, index: tuple[Index, ...]) -> jax.Array:
        """``rows @ weight[index].T``, accumulated in float32.

        Args:
            rows: ``[n, I]``.
            index: One entry per stack axis.

        Returns:
            ``float32 [n, O]``.
        """

    def per_head_matmul(self, x: jax.Array, index: tuple[Index, ...], *, transpose: bool) -> jax.Array:
        """One product per head: ``out[..., n, :] = weight[index][n] @ x[..., n, :]``.

        Args:
            x: ``[..., N, I]``, or ``[..., N, O]`` with ``transpose``.
            index: One entry per stack axis before the heads.
            transpose: Multiply with ``weight[index][n].T``.

        Returns:
            ``float32 [..., N, O]``, or ``float32 [..., N, I]`` with ``transpose``.
        """
        return einsum_f32("...no,noi->...ni" if transpose else "...ni,noi->...no", x, self.values(index))

    @abc.abstractmethod
    def gather(self, rows: jax.Array) -> jax.Array:
        """Rows of a matrix ``[V, D]`` as ``[..., D]``, for integer indices ``[...]``."""

    def can_fuse_gate_up(self, up: WeightMatrix) -> bool:
        """Whether :meth:`fused_gate_up` runs for this gate and ``up``."""
        del up
        return False

    def fused_gate_up(self, rows: jax.Array, up: WeightMatrix, index: tuple[Index, ...]) -> jax.Array:
        """``silu(rows @ weight[index].T) * (rows @ up[index].T)`` in one kernel; see :meth:`can_fuse_gate_up`."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel for gate and up together")

    def can_tile(self, *, transposed: bool) -> bool:
        """Whether :meth:`to_tiles` has a layout for this weight."""
        del transposed
        return False

    def to_tiles(self, *, transposed: bool) -> tuple[Tiles, QuantSpec | None]:
        """The weight in the layout of :mod:`pallas_kernels.tiles`; see :meth:`can_tile`.

        Args:
            transposed: Lay out the transposed matrices.

        Returns:
            The tiles, and the quantization of the weight that :meth:`untile` restores from them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no layout in tiles")

    def as_param(self) -> WeightMatrix | jax.Array:
        """The leaf of a parameter tree for this weight: itself, or the plain array of a wrapper."""
        return self

    def untile(self) -> WeightMatrix | jax.Array:
        """The weight out of its tiles; itself where it is in none."""
        return self

    def to_local(self) -> WeightMatrix | jax.Array:
        """The weight as one device of several sees it inside ``shard_map``."""
        return self
