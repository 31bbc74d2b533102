"""Quantizing weights: round to nearest, or search each block's scale for the least squared error."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from glm_jax.errors import QuantError
from glm_jax.weights.codes import E2M1_MAX, E2M1_VALUES, E4M3_MAX, pack_nibbles
from glm_jax.weights.indexing import largest_divisor
from glm_jax.weights.quant_spec import QuantSpec
from glm_jax.weights.quantized_tensor import QuantizedTensor

QuantMethod = Literal["rtn", "mse"]

# Fractions of a block's range that the search tries, and how often the best scale is then refitted to its own codes. On
# normal weights this gives less error than 41 fractions from 1 to 0.6 alone.
_SHRINK_FACTORS = np.linspace(1.0, 0.7, 6, dtype=np.float32)
_SHRINK_FACTORS_ZERO_POINT = np.linspace(1.0, 0.7, 16, dtype=np.float32)
_REFITS = 2
_CHUNK_VALUES = 1 << 18  # searched together: what a core's cache holds


def quantize(
    weight: jax.Array, spec: QuantSpec, method: QuantMethod = "mse", dtype: DTypeLike = jnp.bfloat16
) -> QuantizedTensor:
    """Quantizes a matrix, or a stack of them.

    Args:
        weight: ``[*stack, O, I]`` in any float dtype.
        spec: Quantization of the result, without ``outer``, ``permuted`` and biases, which are only read.
        method: "rtn" covers each block's range exactly and rounds to nearest; "mse" also tries narrower ranges, which
            clip the largest values, and keeps the scale with the least squared error.
        dtype: Dtype of the model.

    Raises:
        QuantError: If the block does not divide the matrix, or the spec is one that is only read.
    """
    check_can_quantize(spec, weight.shape)
    if method not in get_args(QuantMethod):
        raise QuantError(f"no method {method!r}; there are {', '.join(get_args(QuantMethod))}")
    codes, scales, zeros = _quantize(weight, spec, method)
    return QuantizedTensor(codes, scales, zeros, spec=spec, dtype=jnp.dtype(dtype))


def check_can_quantize(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    """Checks that :func:`quantize` supports this spec for a weight of this shape.

    Raises:
        QuantError: With the reason, if it does not.
    """
    spec.component_shapes(shape)
    rows, columns = spec.block
    for size, block, axis_name in ((shape[-2], rows, "outputs"), (shape[-1], columns, "inputs")):
        if block and size % block:
            raise QuantError(f"blocks of {block} {axis_name} do not divide the {size} of a matrix {list(shape)}")
    if spec.outer != "none" or spec.permuted or spec.zero == "bias" or spec.scale == "e4m3":
        raise QuantError(f"weights stored as {spec!r} can be read but are not made here")


@functools.partial(jax.jit, static_argnames=("spec", "method"))
def _quantize(weight: jax.Array, spec: QuantSpec, method: QuantMethod) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    blocks = to_blocks(weight.astype(jnp.float32), spec)
    flat = blocks.reshape(-1, *blocks.shape[-2:])  # blocks are independent of each other
    chunk = largest_divisor(flat.shape[0], max(1, _CHUNK_VALUES // math.prod(flat.shape[1:])))
    search = functools.partial(_search_scales, spec=spec, method=method)
    parts = jax.lax.map(search, flat.reshape(-1, chunk, *flat.shape[1:]))
    scale, zero = (part.reshape(*blocks.shape[:-2], 1, 1) for part in parts)
    return pack_components(quantize_blocks(blocks, scale, zero, spec), scale, zero, spec, weight.shape)


class _ScaleCandidate(NamedTuple):
    """Scale, zero point and squared error of each block, ``float32 [..., 1, 1]`` each."""

    scale: jax.Array
    zero: jax.Array
    error: jax.Array


def _search_scales(blocks: jax.Array, spec: QuantSpec, method: QuantMethod) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points ``[n, 1, 1]`` of blocks ``[n, rows, columns]``."""

    def measured(scale: jax.Array, zero: jax.Array) -> _ScaleCandidate:
        error = dequantize_blocks(quantize_blocks(blocks, scale, zero, spec), scale, zero, spec) - blocks
        return _ScaleCandidate(scale, zero, jnp.sum(error * error, axis=(-2, -1), keepdims=True))

    def shrunk(best: _ScaleCandidate, shrink: jax.Array) -> tuple[_ScaleCandidate, None]:
        return _select_better(best, measured(*_block_scales(blocks, spec, shrink))), None

    def refitted(best: _ScaleCandidate, _: None) -> tuple[_ScaleCandidate, None]:
        """Refits the scale to the codes it produced: ``sum(w q) / sum(q q)``."""
        codes = quantize_blocks(blocks, best.scale, best.zero, spec)
        products = [jnp.sum(codes * other, axis=(-2, -1), keepdims=True) for other in (blocks, codes)]
        scale = round_scale(products[0] / jnp.where(products[1] > 0, products[1], 1.0), spec)
        return _select_better(best, measured(scale, best.zero)), None

    best = measured(*_block_scales(blocks, spec, jnp.float32(1.0)))
    if method == "mse":
        symmetric = spec.zero == "none"
        best, _ = jax.lax.scan(
            shrunk, best, jnp.asarray((_SHRINK_FACTORS if symmetric else _SHRINK_FACTORS_ZERO_POINT)[1:])
        )
        best, _ = jax.lax.scan(refitted, best, None, length=_REFITS if symmetric else 0)
    return best.scale, best.zero


def _select_better(best: _ScaleCandidate, new: _ScaleCandidate) -> _ScaleCandidate:
    wins = new.error < best.error
    return _ScaleCandidate(*(jnp.where(wins, a, b) for a, b in zip(new, best, strict=True)))


def to_blocks(weight: jax.Array, spec: QuantSpec) -> jax.Array:
    """``[*stack, O, I]`` as ``[*stack, O/rows, I/columns, rows, columns]``."""
    *stack, outputs, inputs = weight.shape
    rows, columns = spec.block[0] or outputs, spec.block[1] or inputs
    return jnp.swapaxes(weight.reshape(*stack, outputs // rows, rows, inputs // columns, columns), -3, -2)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`to_blocks`."""
    return jnp.swapaxes(blocks, -3, -2).reshape(shape)


def _block_scales(blocks: jax.Array, spec: QuantSpec, shrink: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point ``[..., 1, 1]`` of each block, with its range shrunk by a factor."""
    axes = (-2, -1)
    if spec.zero == "point":
        low = jnp.minimum(jnp.min(blocks, axis=axes, keepdims=True), 0.0) * shrink
        high = jnp.maximum(jnp.max(blocks, axis=axes, keepdims=True), 0.0) * shrink
        return scale_and_zero_point(low, high, spec)
    widest = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True) * shrink
    scale = round_scale(widest / symmetric_qmax(spec), spec)
    return scale, jnp.zeros_like(scale)


def symmetric_qmax(spec: QuantSpec) -> float:
    """Steps between zero and the end of a symmetric range.

    int4 has 7.5: codes -8 .. 7 cover the range -7.5 .. 7.5 with an error of at most half a step.
    """
    return {"int4": 7.5, "int8": 127.0, "fp8": E4M3_MAX, "fp4": E2M1_MAX}[spec.kind]


def scale_and_zero_point(low: jax.Array, high: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of the range ``low <= 0 <= high``."""
    last = 2.0**spec.bits - 1
    scale = round_scale((high - low) / last, spec)
    return scale, jnp.clip(jnp.round(-low / scale), 0.0, last)


def round_scale(scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """Rounds a scale to its stored dtype, returned in float32; 1 for a block of zeros."""
    scale = jnp.where(scale > 0, scale, 1.0)
    if spec.scale == "e8m0":
        return jnp.exp2(jnp.clip(jnp.ceil(jnp.log2(scale)), -127.0, 127.0))
    kind = jnp.dtype(spec.scale)
    smallest, largest = jnp.finfo(kind).tiny, jnp.finfo(kind).max
    return jnp.clip(scale, float(smallest), float(largest)).astype(kind).astype(jnp.float32)


def quantize_blocks(blocks: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec) -> jax.Array:
    """Codes as float32 numbers; for fp8 and fp4 the values that the codes represent."""
    x = blocks / scale
    if spec.kind == "fp8":
        return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    if spec.kind == "fp4":
        return jnp.clip(x, -E2M1_MAX, E2M1_MAX).astype(jnp.float4_e2m1fn).astype(jnp.float32)
    return jnp.clip(jnp.round(x) + zero, *qvalue_range(spec))


def qvalue_range(spec: QuantSpec) -> tuple[float, float]:
    """Smallest and largest integer code of :func:`quantize`, before the offset of symmetric int4."""
    if spec.zero == "point":
        return 0.0, 2.0**spec.bits - 1
    return (-8.0, 7.0) if spec.kind == "int4" else (-127.0, 127.0)


def dequantize_blocks(codes: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec) -> jax.Array:
    """The values of :func:`quantize_blocks`'s codes."""
    return (codes - zero) * scale if spec.zero == "point" else codes * scale


def pack_components(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, spec: QuantSpec, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Packs codes, scales and zero points by block into the stored arrays of a :class:`QuantizedTensor`."""
    flat = from_blocks(codes, shape)
    kind = spec.component_shapes(shape)["codes"][1]
    if spec.kind == "int4":
        stored = pack_nibbles((flat + (8.0 if spec.zero == "none" else 0.0)).astype(jnp.uint8))
    elif spec.kind == "fp8":
        stored = jax.lax.bitcast_convert_type(flat.astype(jnp.float8_e4m3fn), jnp.uint8)
    elif spec.kind == "fp4":
        stored = pack_nibbles(_encode_e2m1(flat))
    else:
        stored = flat.astype(kind)
    scales = scale[..., 0, 0]
    if spec.scale == "e8m0":
        packed_scales = (jax.lax.bitcast_convert_type(scales, jnp.uint32) >> 23).astype(jnp.uint8)
    else:
        packed_scales = scales.astype(jnp.dtype(spec.scale))
    zeros = None
    if spec.zero == "point":
        zeros = zero[..., 0, 0].astype(spec.component_shapes(shape)["zeros"][1])
    return stored, packed_scales, zeros


def _encode_e2m1(values: jax.Array) -> jax.Array:
    magnitude = jnp.searchsorted(jnp.asarray(E2M1_VALUES, jnp.float32), jnp.abs(values)).astype(jnp.uint8)
    return magnitude | jnp.where(values < 0, jnp.uint8(8), jnp.uint8(0))
