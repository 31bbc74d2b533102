"""Transforms between a checkpoint tensor and its parameters: views, copies and repacking, never arithmetic."""

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
    """Splits a checkpoint tensor into one or several parameters, which it concatenates along their axis 1.

    Attributes:
        merges_heads: Whether the checkpoint merges the first two axes. ``kv_b_proj``, ``[N*(Hn+Hv), R]``, does: it
            holds ``k_b``, ``[N, Hn, R]``, and ``v_b``, ``[N, Hv, R]``.
        is_transposed: Whether the checkpoint swaps the last two axes of its only parameter, as MLX and GGUF do with
            ``k_b``.
    """

    merges_heads: bool = False
    is_transposed: bool = False

    def tensor_shape(self, param_shapes: Sequence[Shape]) -> Shape:
        """Shape of the checkpoint tensor that holds parameters of these shapes."""
        if len(param_shapes) == 1:
            shape = param_shapes[0]
            return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape
        first, *rest = param_shapes[0]
        joined = (first, sum(shape[1] for shape in param_shapes), *rest[1:])
        return (joined[0] * joined[1], *joined[2:]) if self.merges_heads else joined

    def param_quant_spec(self, tensor_spec: QuantSpec | None, shape: Shape) -> QuantSpec | None:
        """Quantization of the parameters of a tensor with this quantization and shape; None if they are plain."""
        if tensor_spec is None:
            return None
        rows, columns = tensor_spec.block
        if self.is_transposed:
            if shape[-2] % tensor_spec.values_per_byte:
                return None  # the codes cannot be packed along the other axis
            columns = 1 if tensor_spec.permuted and columns else columns
            return dataclasses.replace(tensor_spec, block=(columns, rows), permuted=False)
        return dataclasses.replace(tensor_spec, block=(1, columns)) if self.merges_heads and rows > 1 else tensor_spec

    def split(
        self, tensor: Array | QuantizedTensor, param_shapes: Sequence[Shape]
    ) -> tuple[Array | QuantizedTensor, ...]:
        """Parameters of a tensor: views of a plain tensor; a quantized tensor is repacked if necessary."""
        if isinstance(tensor, QuantizedTensor):
            return self._split_quantized(tensor, param_shapes)
        if len(param_shapes) == 1:
            return (np.swapaxes(tensor, -1, -2) if self.is_transposed else tensor,)
        rows = [shape[1] for shape in param_shapes]
        by_head = tensor.reshape(param_shapes[0][0], sum(rows), *param_shapes[0][2:])
        return tuple(np.split(by_head, np.cumsum(rows)[:-1], axis=1))

    def _split_quantized(
        self, tensor: QuantizedTensor, param_shapes: Sequence[Shape]
    ) -> tuple[Array | QuantizedTensor, ...]:
        if self.is_transposed:
            return (
                transpose_quantized(tensor)
                if self.param_quant_spec(tensor.spec, tensor.shape)
                else np.asarray(tensor).swapaxes(-1, -2),
            )
        if len(param_shapes) == 1:
            return (tensor,)
        heads, rows = param_shapes[0][0], [shape[1] for shape in param_shapes]
        ends = np.cumsum(rows).tolist()
        by_head = _split_heads(expand_row_scales(tensor) if tensor.spec.block[0] > 1 else tensor, heads)
        return tuple(_slice_head_rows(by_head, end - count, end) for count, end in zip(rows, ends, strict=True))

    def join(self, params: Sequence[Array]) -> Array:
        """Inverse of :meth:`split` for plain arrays: the checkpoint tensor that holds these parameters."""
        if len(params) == 1:
            return np.swapaxes(params[0], -1, -2) if self.is_transposed else params[0]
        return np.concatenate(params, axis=1).reshape(self.tensor_shape([param.shape for param in params]))


def _split_heads(tensor: QuantizedTensor, heads: int) -> QuantizedTensor:
    """Reshapes a matrix ``[N * H, I]`` to a stack ``[N, H, I]``."""

    def split_component(name: str, array: Array) -> Array:
        if name in ("outer", "permutation"):
            return np.ascontiguousarray(np.broadcast_to(array, (heads, *array.shape)))
        if name != "codes" and not tensor.spec.block[0]:
            return np.ascontiguousarray(np.broadcast_to(array, (heads, *array.shape)))
        return array.reshape(heads, -1, array.shape[-1])

    return tensor.map_components(split_component)


def _slice_head_rows(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Outputs ``start`` to ``stop`` of every head, whose scales are per output or shared by all outputs."""
    shared_scales = not tensor.spec.block[0]

    def slice_component(name: str, array: Array) -> Array:
        if name in ("outer", "permutation") or (name != "codes" and shared_scales):
            return array
        return np.ascontiguousarray(array[:, start:stop])

    return tensor.map_components(slice_component)


IDENTITY = Transform()
MERGED_HEADS = Transform(merges_heads=True)
TRANSPOSED = Transform(is_transposed=True)
