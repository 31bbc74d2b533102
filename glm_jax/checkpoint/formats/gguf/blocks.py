"""Decodes blocks of GGUF's tensor types into the codes and scales of a QuantizedTensor, without loss.

Dequantized values equal ggml's in float32, bit for bit: nested scales are multiplied here in ggml's order, and
:func:`glm_jax.weights.dequantize` then multiplies the code in one operation, as ggml does. The bit layouts are those of
``ggml-common.h`` and ``ggml-quants.c`` (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.gguf.ggml_types import GgmlType
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.codes import pack_nibbles
from glm_jax.weights.quant_spec import QuantDtype, ScaleDtype, ZeroPointKind

Array = np.ndarray[Any, np.dtype[Any]]
Components = dict[str, Array]

_CHUNK_VALUES = 1 << 18  # values decoded at a time, so that temporary arrays stay small
_HALF = np.dtype("<f2")
# kvalues_iq4nl of ggml: the sixteen values of IQ4_NL and IQ4_XS.
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def repack_blocks(raw: Array, ggml_type: GgmlType, name: str) -> QuantizedTensor:
    """Decodes a weight ``[*stack, O, I]`` from its bytes.

    Args:
        raw: Bytes of the tensor, ``uint8 [*stack, O, row_bytes]``.
        ggml_type: A type in :data:`REPACKED_TYPES`.
        name: Name of the tensor for error messages.

    Raises:
        CheckpointError: If the scale or bias of a block is not finite.
    """
    spec, decode = REPACKED_TYPES[ggml_type.name]
    shape = (*raw.shape[:-1], raw.shape[-1] // ggml_type.type_size * ggml_type.block_size)
    components = {key: np.empty(size, dtype) for key, (size, dtype) in spec.component_shapes(shape).items()}
    blocks = raw.reshape(-1, ggml_type.type_size)
    by_block = {key: array.reshape(len(blocks), -1) for key, array in components.items()}
    step = max(1, _CHUNK_VALUES // ggml_type.block_size)
    for start in range(0, len(blocks), step):
        with np.errstate(invalid="ignore"):  # an infinite scale times a code of 0, as in ggml
            decoded = decode(blocks[start : start + step])
        if not _has_finite_scales(decoded, spec):
            raise CheckpointError(f"{name} has a block whose scale is not a number: the file is damaged")
        if spec.values_per_byte == 2:
            decoded["codes"] = pack_nibbles(decoded["codes"])
        for key, array in by_block.items():
            array[start : start + step] = decoded[key]
    return QuantizedTensor(**components, spec=spec)


def _has_finite_scales(decoded: Components, spec: QuantSpec) -> bool:
    if spec.scale == "e8m0":
        return decoded["scales"].max(initial=0) < 255
    return all(bool(np.isfinite(decoded[key]).all()) for key in ("scales", "zeros") if key in decoded)


def _unpack_nibbles(packed: Array, width: int) -> Array:
    """Unpacks 4-bit codes ``[n, 2 * bytes]``: the low nibbles of each ``width`` bytes, then their high nibbles."""
    packed = packed.reshape(len(packed), -1, 1, width)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _unpack_bit_fields(packed: Array, width: int, bits: int) -> Array:
    """Unpacks codes of few bits: the lowest fields of each ``width`` bytes, then their next fields, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes = packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


def _read_float16(blocks: Array, offset: int) -> Array:
    """The float16 number at a byte offset of each block, as ``float32 [n, 1]``."""
    return blocks[:, offset : offset + 2].view(_HALF).astype(np.float32)


def _scaled(scale: Array, factors: Array) -> Array:
    return scale * factors.astype(np.float32)


def _high_bits(blocks: Array, offset: int) -> Array:
    """The fifth bit of each of a block's 32 codes, shifted to its position: 0 or 16."""
    return np.unpackbits(blocks[:, offset : offset + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Array) -> Components:
    return {"scales": blocks[:, :2].view(_HALF), "codes": _unpack_nibbles(blocks[:, 2:], 16)}


def _q4_1(blocks: Array) -> Components:
    return {
        "scales": blocks[:, :2].view(_HALF),
        "zeros": blocks[:, 2:4].view(_HALF),
        "codes": _unpack_nibbles(blocks[:, 4:], 16),
    }


def _q5_0(blocks: Array) -> Components:
    codes = _unpack_nibbles(blocks[:, 6:], 16) | _high_bits(blocks, 2)
    return {"scales": blocks[:, :2].view(_HALF), "codes": codes.view(np.int8) - np.int8(16)}


def _q5_1(blocks: Array) -> Components:
    return {
        "scales": blocks[:, :2].view(_HALF),
        "zeros": blocks[:, 2:4].view(_HALF),
        "codes": _unpack_nibbles(blocks[:, 8:], 16) | _high_bits(blocks, 4),
    }


def _q8_0(blocks: Array) -> Components:
    return {"scales": blocks[:, :2].view(_HALF), "codes": blocks[:, 2:].view(np.int8)}


def _q2_k(blocks: Array) -> Components:
    scale, minimum = _read_float16(blocks, 80), _read_float16(blocks, 82)
    return {
        "scales": _scaled(scale, blocks[:, :16] & 15),
        "zeros": -_scaled(minimum, blocks[:, :16] >> 4),
        "codes": _unpack_bit_fields(blocks[:, 16:80], 32, 2),
    }


def _q3_k(blocks: Array) -> Components:
    low, high = _unpack_nibbles(blocks[:, 96:104], 8), _unpack_bit_fields(blocks[:, 104:108], 4, 2)
    factors = (low | high << 4).view(np.int8) - np.int8(32)
    # ggml subtracts 4 from a code whose third bit is clear; a QuantSpec of int4 subtracts 8 from every code.
    codes = _unpack_bit_fields(blocks[:, 32:96], 32, 2) + (_unpack_bit_fields(blocks[:, :32], 32, 1) << 2) + np.uint8(4)
    return {"scales": _scaled(_read_float16(blocks, 108), factors), "codes": codes}


def _unpack_6bit_scales(packed: Array) -> tuple[Array, Array]:
    """Unpacks eight scales and eight minima of 6 bits each from 12 bytes."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _k_scales(blocks: Array) -> Components:
    """Scales and biases of Q4_K and Q5_K."""
    scales, minima = _unpack_6bit_scales(blocks[:, 4:16])
    return {"scales": _scaled(_read_float16(blocks, 0), scales), "zeros": -_scaled(_read_float16(blocks, 2), minima)}


def _q4_k(blocks: Array) -> Components:
    return {**_k_scales(blocks), "codes": _unpack_nibbles(blocks[:, 16:], 32)}


def _q5_k(blocks: Array) -> Components:
    codes = _unpack_nibbles(blocks[:, 48:], 32) | _unpack_bit_fields(blocks[:, 16:48], 32, 1) << 4
    return {**_k_scales(blocks), "codes": codes}


def _q6_k(blocks: Array) -> Components:
    codes = _unpack_nibbles(blocks[:, :128], 64) | _unpack_bit_fields(blocks[:, 128:192], 32, 2) << 4
    scales = _scaled(_read_float16(blocks, 208), blocks[:, 192:208].view(np.int8))
    return {"scales": scales, "codes": codes.view(np.int8) - np.int8(32)}


def _iq4_nl(blocks: Array) -> Components:
    return {"scales": blocks[:, :2].view(_HALF), "codes": _IQ4_VALUES.take(_unpack_nibbles(blocks[:, 2:], 16))}


def _iq4_xs(blocks: Array) -> Components:
    low, high = _unpack_nibbles(blocks[:, 4:8], 1), _unpack_bit_fields(blocks[:, 2:4], 1, 2)
    factors = (low | high << 4).view(np.int8) - np.int8(32)
    return {
        "scales": _scaled(_read_float16(blocks, 0), factors),
        "codes": _IQ4_VALUES.take(_unpack_nibbles(blocks[:, 8:], 16)),
    }


def _mxfp4(blocks: Array) -> Components:
    codes = _unpack_nibbles(blocks[:, 1:], 16)
    # ggml has no negative zero. It also halves the scale and doubles the codes, which cancels.
    codes[codes == 8] = 0
    return {"scales": blocks[:, :1], "codes": codes}


def _spec(kind: QuantDtype, group_size: int, scale: ScaleDtype, zero: ZeroPointKind = "none") -> QuantSpec:
    return QuantSpec(kind=kind, block=(1, group_size), scale=scale, zero=zero)


REPACKED_TYPES: dict[str, tuple[QuantSpec, Callable[[Array], Components]]] = {
    "Q4_0": (_spec("int4", 32, "float16"), _q4_0),
    "Q4_1": (_spec("int4", 32, "float16", "bias"), _q4_1),
    "Q5_0": (_spec("int8", 32, "float16"), _q5_0),
    "Q5_1": (_spec("int8", 32, "float16", "bias"), _q5_1),
    "Q8_0": (_spec("int8", 32, "float16"), _q8_0),
    "Q2_K": (_spec("int4", 16, "float32", "bias"), _q2_k),
    "Q3_K": (_spec("int4", 16, "float32"), _q3_k),
    "Q4_K": (_spec("int4", 32, "float32", "bias"), _q4_k),
    "Q5_K": (_spec("int8", 32, "float32", "bias"), _q5_k),
    "Q6_K": (_spec("int8", 16, "float32"), _q6_k),
    "IQ4_NL": (_spec("int8", 32, "float16"), _iq4_nl),
    "IQ4_XS": (_spec("int8", 32, "float32"), _iq4_xs),
    "MXFP4": (_spec("fp4", 32, "e8m0"), _mxfp4),
}
"""Types that a QuantSpec holds exactly: the spec, and the function that decodes their blocks."""

EXPANDED_TYPES = frozenset("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0 NVFP4".split())
"""Types that no QuantSpec holds: the gguf package dequantizes them."""


def expand_blocks(raw: Array, ggml_type: GgmlType, name: str) -> Array:
    """Dequantizes a weight to ``float32 [*stack, O, I]`` with the gguf package.

    Args:
        raw: Bytes of the tensor, ``uint8 [*stack, O, row_bytes]``.
        ggml_type: A type in :data:`EXPANDED_TYPES`.
        name: Name of the tensor for error messages.

    Raises:
        CheckpointError: If the gguf package is not installed, or does not know the type.
    """
    try:
        import gguf  # optional extra
    except ImportError:
        raise CheckpointError(
            f'{name} is of type {ggml_type.name}, which takes the gguf package to read: pip install "glm-jax[gguf]"'
        ) from None
    rows = raw.reshape(math.prod(raw.shape[:-1]), raw.shape[-1])
    out = np.empty((len(rows), raw.shape[-1] // ggml_type.type_size * ggml_type.block_size), np.float32)
    step = max(1, _CHUNK_VALUES // out.shape[1])
    try:
        gguf_type = gguf.GGMLQuantizationType[ggml_type.name]
        for start in range(0, len(rows), step):
            with np.errstate(all="ignore"):
                out[start : start + step] = gguf.dequantize(np.ascontiguousarray(rows[start : start + step]), gguf_type)
    except (KeyError, NotImplementedError):
        raise CheckpointError(
            f"{name} is of type {ggml_type.name}, which the installed gguf package cannot read"
        ) from None
    return out.reshape(*raw.shape[:-1], out.shape[1])
