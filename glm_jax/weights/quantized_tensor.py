"""A quantized weight: a pytree of arrays that stands for a matrix, or a stack of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from glm_jax.weights.codes import array_namespace, decode_e2m1, decode_e4m3, decode_e8m0
from glm_jax.weights.quant_spec import QuantSpec

Array = Any  # np.ndarray, jax.Array or jax.ShapeDtypeStruct
COMPONENTS = ("codes", "scales", "zeros", "outer", "permutation")


@functools.partial(jax.tree_util.register_dataclass, data_fields=COMPONENTS, meta_fields=["spec", "dtype"])
@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight ``[*stack, O, I]`` in codes and scales; see :class:`~glm_jax.weights.QuantSpec` for the formulas.

    Attributes:
        codes: ``[*stack, O, I]``, uint8 or int8; with 4-bit codes uint8 ``[*stack, O, I/2]``, column 2j in the low half
            of byte j and column 2j + 1 in the high one.
        scales: ``[*stack, ceil(O/rows), ceil(I/columns)]`` for ``spec.block == (rows, columns)``.
        zeros: zero points or biases, shaped like the scales, or None.
        outer: float32 ``[*stack]`` or None.
        permutation: int32 ``[*stack, I]`` or None; stored column j is input ``permutation[j]``.
        spec: what the arrays mean.
        dtype: of the model that the weight is part of.
    """

    codes: Array
    scales: Array
    zeros: Array = None
    outer: Array = None
    permutation: Array = None
    spec: QuantSpec = dataclasses.field(kw_only=True)
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, not of the codes."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * self.spec.values_per_byte)

    @property
    def ndim(self) -> int:
        """Number of dimensions of the weight."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(array.nbytes for array in self.components().values())

    def components(self) -> dict[str, Array]:
        """The arrays that are there, by name."""
        return {name: array for name in COMPONENTS if (array := getattr(self, name)) is not None}

    def map_components(self, function: Any) -> QuantizedTensor:
        """The same with ``function(name, array)`` in place of each array."""
        changed = {name: function(name, array) for name, array in self.components().items()}
        return dataclasses.replace(self, **changed)

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Entries of the leading (stack) axis."""
        if self.ndim < 3:
            raise IndexError("a single matrix has no stack axis to index")
        return self.map_components(lambda _, array: array[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array of float32 (or ``dtype``)."""
        values = dequantize(self.map_components(lambda _, array: np.asarray(array)))
        return values if dtype is None else values.astype(dtype)


def dequantize(tensor: QuantizedTensor) -> Array:
    """The values, float32 ``[*stack, O, I]``, of NumPy or JAX arrays (the whole at once: not for a hot path)."""
    xp = array_namespace(tensor.codes)
    planes = dequantize_planes(tensor)
    values = planes[0] if len(planes) == 1 else xp.stack(planes, axis=-1).reshape(tensor.shape)
    if tensor.permutation is None:
        return values
    place = xp.argsort(tensor.permutation, axis=-1)
    return xp.take_along_axis(values, xp.broadcast_to(place[..., None, :], values.shape), axis=-1)


def dequantize_planes(tensor: QuantizedTensor) -> list[Array]:
    """The values as stored: float32 ``[*stack, O, I / per_byte]`` for each code of a byte.

    Plane i holds columns i, i + per_byte, … so 4-bit codes need not be interleaved again before a product.
    """
    spec, count = tensor.spec, tensor.spec.values_per_byte
    scales = expand_planes(decode_scales(tensor), spec, tensor.shape)
    codes = decode_planes(tensor.codes, spec)
    if spec.zero == "none":
        return [codes[i] * scales[i % len(scales)] for i in range(count)]
    zeros = expand_planes(tensor.zeros.astype(array_namespace(tensor.codes).float32), spec, tensor.shape)
    triples = [(codes[i], scales[i % len(scales)], zeros[i % len(zeros)]) for i in range(count)]
    return [u * s + z if spec.zero == "bias" else (u - z) * s for u, s, z in triples]


def decode_planes(codes: Array, spec: QuantSpec) -> list[Array]:
    """What the codes of each plane stand for before scale and zero point, float32."""
    xp = array_namespace(codes)
    if spec.kind == "int8":
        return [codes.astype(xp.float32)]
    if spec.kind == "fp8":
        return [decode_e4m3(codes)]
    halves = [codes & xp.uint8(15), codes >> xp.uint8(4)]
    if spec.kind == "fp4":
        return [decode_e2m1(half) for half in halves]
    offset = xp.float32(8 if spec.zero == "none" else 0)
    return [half.astype(xp.float32) - offset for half in halves]


def decode_scales(tensor: QuantizedTensor) -> Array:
    """The scales in float32, those of the whole matrix included."""
    xp, spec = array_namespace(tensor.codes), tensor.spec
    decode = {"e4m3": decode_e4m3, "e8m0": decode_e8m0}.get(spec.scale, lambda x: x.astype(xp.float32))
    scales = decode(tensor.scales)
    if spec.outer == "none":
        return scales
    outer = tensor.outer[..., None, None]
    return scales * outer if spec.outer == "multiply" else scales / outer


def expand_planes(blocks: Array, spec: QuantSpec, shape: tuple[int, ...]) -> list[Array]:
    """A value per block as one per stored code, for each plane; one array where all planes have the same.

    An axis that a single block spans keeps size 1.
    """
    (rows, columns), count = spec.block, spec.values_per_byte
    if rows > 1 and blocks.shape[-2] > 1:
        blocks = _repeat(blocks, rows, -2)[..., : shape[-2], :]
    if blocks.shape[-1] == 1:
        return [blocks]
    if columns % count == 0:
        return [_repeat(blocks, columns // count, -1)[..., : shape[-1] // count]]
    wide = _repeat(blocks, columns, -1)[..., : shape[-1]]
    return [wide[..., i::count] for i in range(count)]


def _repeat(array: Array, count: int, axis: int) -> Array:
    return array if count == 1 else array_namespace(array).repeat(array, count, axis=axis)
