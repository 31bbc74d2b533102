"""Reads GPTQ checkpoints, versions 1 and 2, and AutoRound's variants: integers of 2 to 8 bits packed along the inputs.

The tensors are ``qweight``, ``int32 [I·b/32, O]``, ``scales``, ``[G, O]``, ``qzeros``, ``int32 [G, O·b/32]``, and from
GPTQ ``g_idx``, ``int32 [I]``. Version 1 stores zero points minus one, so that they range from 1 to 2^b: a stored 15 of
4 bits means 16, as in the kernels of the usual engines. GPTQModel is the exception. It subtracts a pattern of ones from
whole words and adds it to whole words again, with borrows from and carries into the neighbor, and can thus write zero
points of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.base import SCALE_DTYPES, Array, QuantizedModule, StoredWeight, scale_dtype_of
from glm_jax.checkpoint.formats.bit_packing import packed_word_count, unpack_bits
from glm_jax.checkpoint.formats.integers import (
    IntegerLayout,
    UnpackedIntegers,
    has_equal_groups,
    read_group_index,
    stored_integer_weight,
    unpack_codes,
)
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme, QuantizationConfig

BITS = range(2, 9)
_WORD_ALIGNED_BITS = (2, 4, 8)  # widths whose values never cross a word boundary
# checkpoint_format or packing_format -> whether zero points are stored minus one.
_MINUS_ONE_FORMATS = {
    "gptq": True,
    "gptq_v2": False,
    "auto_round:auto_gptq": True,
    "auto_round": False,
    "auto_round:gptqmodel": False,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ZeroPointEncoding:
    """Encoding of stored zero points.

    Attributes:
        is_minus_one: Whether the stored number is the zero point minus one.
        is_modular: Whether the one was subtracted from whole words, modulo 2^32 (GPTQModel).
    """

    is_minus_one: bool
    is_modular: bool


def zero_point_encoding(config: QuantizationConfig) -> ZeroPointEncoding:
    """Encoding of zero points under a configuration that :func:`unsupported_gptq_layout` accepts."""
    return ZeroPointEncoding(_MINUS_ONE_FORMATS[_layout_name(config)], _writer(config.section) == "gptqmodel")


def unsupported_gptq_layout(config: QuantizationConfig) -> str | None:
    """Reason why GPTQ tensors under this configuration are not read, or None if they are."""
    method = config.quant_method
    if method not in ("gptq", "auto-round"):
        return f"the configuration describes {method or 'no quantization'}, but the tensors are GPTQ's"
    layout = _layout_name(config)
    if layout not in _MINUS_ONE_FORMATS:
        key = "packing_format" if method == "auto-round" else "checkpoint_format"
        return f"{key} {layout} is not read (known are {', '.join(_MINUS_ONE_FORMATS)})"
    return None


def _layout_name(config: QuantizationConfig) -> str:
    if config.quant_method == "auto-round":
        return config.packing_format
    return str(config.section.get("checkpoint_format") or "gptq").lower()


def read_gptq(
    module: QuantizedModule, scheme: DeclaredScheme, encoding: ZeroPointEncoding, *, planar: bool
) -> StoredWeight:
    """Reads a module of ``qweight``, ``qzeros``, ``scales`` and optionally ``g_idx``.

    Args:
        module: Tensors of the module.
        scheme: Quantization of the module according to the configuration.
        encoding: Encoding of the zero points.
        planar: Whether the writer packs 5 to 7 bits in bit planes (GPTQModel), which is not read.

    Raises:
        CheckpointError: If tensors are missing, or contradict each other or the configuration.
    """
    words = module.require("qweight", ("I32",), 2).shape[0]
    scales = module.require("scales", tuple(SCALE_DTYPES), 2)
    num_groups, outputs = scales.shape
    zero_words = module.require("qzeros", ("I32",), 2).shape[1]
    module.require_shape("qweight", ("I32",), (words, outputs))
    module.require_shape("qzeros", ("I32",), (num_groups, zero_words))
    indexed_inputs = module.require("g_idx", ("I32", "I64"), 1).shape[0] if "g_idx" in module else None
    bits, inputs = _infer_bits_and_inputs(module, words, zero_words, outputs, indexed_inputs, scheme)
    if planar and bits in (5, 6, 7):
        raise module.error(f"{bits}-bit GPTQ is packed in planes, which is not read")
    permuted = indexed_inputs is not None and scheme.desc_act is not False
    layout = IntegerLayout(
        shape=(outputs, inputs),
        bits=bits,
        group_size=_infer_group_size(module, inputs, num_groups, scheme),
        scale_dtype=scale_dtype_of(scales),
        zero_kind="none" if scheme.symmetric else "point",
        is_permuted=permuted,
        has_equal_groups=not permuted or has_equal_groups(module, "g_idx", num_groups),
    )
    return stored_integer_weight(module, layout, lambda _: _unpack(module, layout, num_groups, encoding))


def _infer_bits_and_inputs(
    module: QuantizedModule,
    words: int,
    zero_words: int,
    outputs: int,
    indexed_inputs: int | None,
    scheme: DeclaredScheme,
) -> tuple[int, int]:
    """The number of bits and of inputs that fit all shapes."""
    fitting = []
    for bits in BITS:
        inputs = words * 32 // bits if indexed_inputs is None else indexed_inputs
        if packed_word_count(inputs, bits) == words and packed_word_count(outputs, bits) == zero_words:
            fitting.append((bits, inputs))
    fitting = [(bits, inputs) for bits, inputs in fitting if scheme.bits in (None, bits)]
    if len(fitting) == 1:
        return fitting[0]
    declared = "" if scheme.bits is None else f"the configuration says {scheme.bits} bits, but "
    raise module.error(f"{declared}qweight has {words} rows and qzeros {zero_words} columns for {outputs} outputs")


def _infer_group_size(module: QuantizedModule, inputs: int, num_groups: int, scheme: DeclaredScheme) -> int:
    """Number of inputs that share a scale, 0 if all do; the last group may be smaller than the others."""
    inferred = 0 if num_groups == 1 else -(-inputs // num_groups)
    group_size = inferred if scheme.group_size is None else scheme.group_size
    if -(-inputs // (group_size or inputs)) != num_groups:
        origin = "the configuration says" if scheme.group_size is not None else "the shapes make"
        raise module.error(f"{origin} groups of {group_size}, but {inputs} inputs have {num_groups} scales")
    return 0 if group_size >= inputs else group_size


def _unpack(
    module: QuantizedModule, layout: IntegerLayout, num_groups: int, encoding: ZeroPointEncoding
) -> UnpackedIntegers:
    codes, nibbles = unpack_codes(module.read("qweight").T, layout)
    zeros = _unpack_zero_points(module.read("qzeros"), layout.bits, layout.shape[0], encoding).T
    middle = 1 << (layout.bits - 1)
    if layout.zero_kind == "none":
        if (zeros != middle).any():
            raise module.error(f"the configuration says symmetric, but not all zero points are {middle}")
        zeros = None
    group_index = _read_group_index(module, layout, num_groups)
    return UnpackedIntegers(codes, module.read("scales").T, zeros, group_index, nibbles)


def _read_group_index(module: QuantizedModule, layout: IntegerLayout, num_groups: int) -> Array | None:
    if "g_idx" not in module:
        return None
    group_index, inputs = read_group_index(module, "g_idx", num_groups), layout.shape[-1]
    if not layout.is_permuted and (group_index != np.arange(inputs) // (layout.group_size or inputs)).any():
        raise module.error("g_idx reorders the inputs, but the configuration says desc_act is false")
    return group_index


def _unpack_zero_points(words: Array, bits: int, outputs: int, encoding: ZeroPointEncoding) -> Array:
    """Unpacks zero points ``int16 [G, O]`` from words ``int32 [G, O·b/32]``."""
    if encoding.is_minus_one and encoding.is_modular and bits in _WORD_ALIGNED_BITS:
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        words = words.view(np.uint32) + np.uint32(ones)
        return unpack_bits(words, bits, outputs).astype(np.int16)
    zeros = unpack_bits(words, bits, outputs).astype(np.int16) + np.int16(encoding.is_minus_one)
    return zeros & np.int16((1 << bits) - 1) if encoding.is_modular else zeros


def _writer(section: Mapping[str, Any]) -> str:
    meta = section.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    first = writers[0] if isinstance(writers, list) and writers else writers
    return str(first).partition(":")[0].lower()
