"""Quantized matrices cut and turned without loss: what a rule table does to plain arrays by slicing and transposing."""

from __future__ import annotations

import dataclasses

import numpy as np

from glm_jax.checkpoint.formats.base import Array
from glm_jax.errors import QuantError
from glm_jax.weights import QuantizedTensor, pack_nibbles, unpack_nibbles


def slice_rows(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Outputs ``start`` to ``stop`` of ``[*stack, O, I]``.

    Where the cut goes through a block of outputs, each output gets a copy of the block's scale.

    Raises:
        QuantError: if there are no such outputs.
    """
    outputs = tensor.shape[-2]
    if not 0 <= start < stop <= outputs:
        raise QuantError(f"a matrix with {outputs} outputs has no outputs {start} to {stop}")
    height = tensor.spec.block[0]
    if height > 1 and (start % height or (stop % height and stop != outputs)):
        tensor, height = expand_row_scales(tensor), 1
    first, last = (start // height, -(-stop // height)) if height else (0, 1)

    def cut(name: str, array: Array) -> Array:
        if name == "codes":
            return array[..., start:stop, :]
        return array[..., first:last, :] if name in ("scales", "zeros") else array

    return tensor.map_components(cut)


def transpose_quantized(tensor: QuantizedTensor) -> QuantizedTensor:
    """``[*stack, O, I]`` as ``[*stack, I, O]``: codes packed anew, blocks turned.

    Columns that are permuted are put in order first, each with a copy of its group's scale.

    Raises:
        QuantError: if 4-bit codes cannot be packed along the outputs because those are odd in number.
    """
    if tensor.spec.permuted:
        tensor = undo_permutation(tensor)
    spec, outputs = tensor.spec, tensor.shape[-2]
    packed = spec.values_per_byte == 2
    if packed and outputs % 2:
        raise QuantError(f"4-bit codes of {outputs} outputs cannot be packed in pairs: the matrix cannot be transposed")
    codes = np.swapaxes(unpack_nibbles(tensor.codes) if packed else tensor.codes, -1, -2)
    height, width = spec.block

    def turn(name: str, array: Array) -> Array:
        if name == "codes":
            return pack_nibbles(codes) if packed else np.ascontiguousarray(codes)
        return np.ascontiguousarray(np.swapaxes(array, -1, -2)) if name in ("scales", "zeros") else array

    return dataclasses.replace(tensor.map_components(turn), spec=dataclasses.replace(spec, block=(width, height)))


def expand_row_scales(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same with a copy of its block's scale for each output."""
    (height, width), outputs = tensor.spec.block, tensor.shape[-2]

    def repeat(name: str, array: Array) -> Array:
        return np.repeat(array, height, axis=-2)[..., :outputs, :] if name in ("scales", "zeros") else array

    return dataclasses.replace(tensor.map_components(repeat), spec=dataclasses.replace(tensor.spec, block=(1, width)))


def undo_permutation(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same with its permuted columns in the order of the inputs, each with a copy of its group's scale.

    One scale per output (or for all) needs no copies and stays as it is.
    """
    (height, width), inputs = tensor.spec.block, tensor.shape[-1]
    place = np.argsort(np.asarray(tensor.permutation), axis=-1)[..., None, :]
    packed = tensor.spec.values_per_byte == 2

    def order(array: Array) -> Array:
        return np.take_along_axis(array, np.broadcast_to(place, (*array.shape[:-1], inputs)), axis=-1)

    def sort(name: str, array: Array) -> Array:
        if name == "codes":
            return pack_nibbles(order(unpack_nibbles(array))) if packed else order(array)
        if name in ("scales", "zeros") and width:
            return order(np.repeat(array, width, axis=-1)[..., :inputs])
        return array

    spec = dataclasses.replace(tensor.spec, block=(height, 1 if width else 0), permuted=False)
    return dataclasses.replace(tensor.map_components(sort), permutation=None, spec=spec)
