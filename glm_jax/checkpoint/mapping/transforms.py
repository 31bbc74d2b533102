"""How one checkpoint tensor becomes parameters, and back: views, copies and repacking, never arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.reshape import expand_row_scales, transpose_quantized
from glm_jax.weights import QuantizedTensor, QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Transform:
    """A checkpoint tensor as one or several parameters, laid side by side along their axis 1.

    With one parameter the tensor is the parameter. ``merges_heads``: the checkpoint merges the first two axes, as it does
    with ``kv_b_proj`` [N*(Hn+Hv), R], which holds ``k_b`` [N, Hn, R] and ``v_b`` [N, Hv, R]. ``is_transposed``: the
    checkpoint has the last two axes the other way round, as MLX and GGUF have those of ``k_b``.
    """

    merges_heads: bool = False
    is_transposed: bool = False

    def tensor_shape(self, param_shapes: Sequence[Shape]) -> Shape:
        """Shape of the checkpoint tensor, given the parameters'."""
        if len(param_shapes) == 1:
            shape = param_shapes[0]
            return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape
        first, *rest = param_shapes[0]
        joined = (first, sum(shape[1] for shape in param_shapes), *rest[1:])
        return (joined[0] * joined[1], *joined[2:]) if self.merges_heads else joined

    def param_quant_spec(self, tensor_spec: QuantSpec | None, shape: Shape) -> QuantSpec | None:
        """How the parameters are stored where the tensor is stored so and has this shape."""
        if tensor_spec is None:
            return None
        rows, columns = tensor_spec.block
        if self.is_transposed:
            if shape[-2] % tensor_spec.values_per_byte:
                return None  # its codes cannot be packed along the other axis
            columns = 1 if tensor_spec.permuted and columns else columns
            return dataclasses.replace(tensor_spec, block=(columns, rows), permuted=False)
        return dataclasses.replace(tensor_spec, block=(1, columns)) if self.merges_heads and rows > 1 else tensor_spec

    def split(self, tensor: Any, param_shapes: Sequence[Shape]) -> tuple[Any, ...]:
        """The parameters as views of the tensor (of a quantized one: repacked where it must be)."""
        if isinstance(tensor, QuantizedTensor):
            return self._split_quantized(tensor, param_shapes)
        if len(param_shapes) == 1:
            return (np.swapaxes(tensor, -1, -2) if self.is_transposed else tensor,)
        rows = [shape[1] for shape in param_shapes]
        apart = tensor.reshape(param_shapes[0][0], sum(rows), *param_shapes[0][2:])
        return tuple(np.split(apart, np.cumsum(rows)[:-1], axis=1))

    def _split_quantized(self, tensor: QuantizedTensor, targets: Sequence[Shape]) -> tuple[Any, ...]:
        if self.is_transposed:
            return (
                transpose_quantized(tensor)
                if self.param_quant_spec(tensor.spec, tensor.shape)
                else np.asarray(tensor).swapaxes(-1, -2),
            )
        if len(targets) == 1:
            return (tensor,)
        heads, rows = targets[0][0], [shape[1] for shape in targets]
        ends = np.cumsum(rows).tolist()
        by_head = _split_heads(expand_row_scales(tensor) if tensor.spec.block[0] > 1 else tensor, heads)
        return tuple(_slice_head_rows(by_head, end - count, end) for count, end in zip(rows, ends, strict=True))

    def join(self, pieces: Sequence[Array]) -> Array:
        """The checkpoint tensor of its parameters."""
        if len(pieces) == 1:
            return np.swapaxes(pieces[0], -1, -2) if self.is_transposed else pieces[0]
        return np.concatenate(pieces, axis=1).reshape(self.tensor_shape([piece.shape for piece in pieces]))


def _split_heads(tensor: QuantizedTensor, heads: int) -> QuantizedTensor:
    """``[N * H, I]`` as ``[N, H, I]``."""

    def apart(name: str, array: Array) -> Array:
        if name in ("outer", "permutation"):
            return np.ascontiguousarray(np.broadcast_to(array, (heads, *array.shape)))
        if name != "codes" and not tensor.spec.block[0]:
            return np.ascontiguousarray(np.broadcast_to(array, (heads, *array.shape)))
        return array.reshape(heads, -1, array.shape[-1])

    return tensor.map_components(apart)


def _slice_head_rows(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Outputs of every head; scales have a row for each output, or one for all."""
    one_for_all = not tensor.spec.block[0]

    def cut(name: str, array: Array) -> Array:
        if name in ("outer", "permutation") or (name != "codes" and one_for_all):
            return array
        return np.ascontiguousarray(array[:, start:stop])

    return tensor.map_components(cut)


IDENTITY = Transform()
MERGED_HEADS = Transform(merges_heads=True)
TRANSPOSED = Transform(is_transposed=True)
