"""Transposes quantized matrices and rearranges their scales without loss, as tensor rules need it."""

from __future__ import annotations

import dataclasses

import numpy as np

from glm_jax.checkpoint.formats.base import Array
from glm_jax.errors import QuantError
from glm_jax.weights import QuantizedTensor, pack_nibbles, unpack_nibbles


def transpose_quantized(tensor: QuantizedTensor) -> QuantizedTensor:
    """Transposes a matrix ``[*stack, O, I]`` to ``[*stack, I, O]``: repacks its codes and transposes its blocks.

    A permutation of the columns is undone first (see :func:`undo_permutation`).

    Raises:
        QuantError: If the codes have 4 bits and the number of outputs is odd, so that pairs cannot be packed.
    """
    if tensor.spec.permuted:
        tensor = undo_permutation(tensor)
    spec, outputs = tensor.spec, tensor.shape[-2]
    packed = spec.values_per_byte == 2
    if packed and outputs % 2:
        raise QuantError(f"4-bit codes of {outputs} outputs cannot be packed in pairs: the matrix cannot be transposed")
    codes = np.swapaxes(unpack_nibbles(tensor.codes) if packed else tensor.codes, -1, -2)
    height, width = spec.block

    def transpose(name: str, array: Array) -> Array:
        if name == "codes":
            return pack_nibbles(codes) if packed else np.ascontiguousarray(codes)
        return np.ascontiguousarray(np.swapaxes(array, -1, -2)) if name in ("scales", "zeros") else array

    return dataclasses.replace(tensor.map_components(transpose), spec=dataclasses.replace(spec, block=(width, height)))


def expand_row_scales(tensor: QuantizedTensor) -> QuantizedTensor:
    """Gives each output a copy of its block's scale, so that blocks are one output high; values stay the same."""
    (height, width), outputs = tensor.spec.block, tensor.shape[-2]

    def repeat(name: str, array: Array) -> Array:
        return np.repeat(array, height, axis=-2)[..., :outputs, :] if name in ("scales", "zeros") else array

    return dataclasses.replace(tensor.map_components(repeat), spec=dataclasses.replace(tensor.spec, block=(1, width)))


def undo_permutation(tensor: QuantizedTensor) -> QuantizedTensor:
    """Puts permuted columns back into the order of the inputs, each with a copy of its group's scale.

    A scale that serves all inputs of an output needs no copies.
    """
    (height, width), inputs = tensor.spec.block, tensor.shape[-1]
    inverse = np.argsort(np.asarray(tensor.permutation), axis=-1)[..., None, :]
    packed = tensor.spec.values_per_byte == 2

    def reorder(array: Array) -> Array:
        return np.take_along_axis(array, np.broadcast_to(inverse, (*array.shape[:-1], inputs)), axis=-1)

    def reorder_component(name: str, array: Array) -> Array:
        if name == "codes":
            return pack_nibbles(reorder(unpack_nibbles(array))) if packed else reorder(array)
        if name in ("scales", "zeros") and width:
            return reorder(np.repeat(array, width, axis=-1)[..., :inputs])
        return array

    spec = dataclasses.replace(tensor.spec, block=(height, 1 if width else 0), permuted=False)
    return dataclasses.replace(tensor.map_components(reorder_component), permutation=None, spec=spec)
