"""GPTQ, versions 1 and 2, and AutoRound's layouts of the same kind: integers of 2 to 8 bits along the inputs.

``qweight`` int32 [I·b/32, O], ``scales`` [G, O], ``qzeros`` int32 [G, O·b/32], and from GPTQ ``g_idx`` int32 [I]. In
version 1 zero points are stored less one, so that they run from 1 to 2^b: adding the one back gives 16 for a stored 15
of 4 bits, as the kernels compute it. GPTQModel is the exception: it subtracts a pattern of ones from whole words and
adds it to whole words again, borrowing from and carrying to the neighbor, and writes zero points of 0 that way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.base import SCALE_DTYPES, Array, QuantizedModule, StoredWeight, scale_kind
from glm_jax.checkpoint.formats.bit_packing import packed_word_count, unpack_bits
from glm_jax.checkpoint.formats.groups import has_equal_groups, read_group_index
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight, unpack_codes
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme, QuantizationConfig

BITS = range(2, 9)
_WORD_ALIGNED_BITS = (2, 4, 8)  # bits whose values never straddle a word
# checkpoint_format or packing_format -> whether zero points are stored less one.
_MINUS_ONE_FORMATS = {
    "gptq": True,
    "gptq_v2": False,
    "auto_round:auto_gptq": True,
    "auto_round": False,
    "auto_round:gptqmodel": False,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ZeroPointEncoding:
    """How zero points are stored: less one or as they are, and by whom."""

    is_minus_one: bool
    is_modular: bool


def zero_point_encoding(description: QuantizationConfig) -> ZeroPointEncoding:
    """From the configuration.

    Raises:
        CheckpointError: for layouts that are not read.
    """
    section, method = description.section, description.quant_method
    said = (
        description.packing_format
        if method == "auto-round"
        else str(section.get("checkpoint_format") or "gptq").lower()
    )
    return ZeroPointEncoding(_MINUS_ONE_FORMATS[said], _writer(section) == "gptqmodel")


def unsupported_gptq_layout(description: QuantizationConfig) -> str | None:
    """Why such a file is not read, or None if it is."""
    method = description.quant_method
    key = "packing_format" if method == "auto-round" else "checkpoint_format"
    said = description.packing_format if method == "auto-round" else str(description.section.get(key) or "gptq").lower()
    if method not in ("gptq", "auto-round"):
        return f"the configuration describes {method or 'no quantization'}, but the tensors are GPTQ's"
    if said not in _MINUS_ONE_FORMATS:
        return f"{key} {said} is not read (known are {', '.join(_MINUS_ONE_FORMATS)})"
    return None


def read_gptq(
    module: QuantizedModule, scheme: DeclaredScheme, encoding: ZeroPointEncoding, *, planar: bool
) -> StoredWeight:
    """A module of ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``.

    Args:
        planar: 5 to 7 bits are packed in planes (GPTQModel's way), which is not read.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    words = module.require("qweight", ("I32",), 2).shape[0]
    scale = module.require("scales", tuple(SCALE_DTYPES), 2)
    groups, outputs = scale.shape
    zero_words = module.require("qzeros", ("I32",), 2).shape[1]
    module.require_shape("qweight", ("I32",), (words, outputs))
    module.require_shape("qzeros", ("I32",), (groups, zero_words))
    indexed = module.require("g_idx", ("I32", "I64"), 1).shape[0] if "g_idx" in module else None
    bits, inputs = _infer_bits_and_inputs(module, words, zero_words, outputs, indexed, scheme)
    if planar and bits in (5, 6, 7):
        raise module.error(f"{bits}-bit GPTQ is packed in planes, which is not read")
    group = scheme.group_size if scheme.group_size is not None else 0 if groups == 1 else -(-inputs // groups)
    if -(-inputs // (group or inputs)) != groups:
        said = "the configuration says" if scheme.group_size is not None else "the shapes make"
        raise module.error(f"{said} groups of {group}, but {inputs} inputs have {groups} scales")
    ordered = indexed is not None and scheme.desc_act is not False
    layout = IntegerLayout(
        shape=(outputs, inputs),
        bits=bits,
        group_size=0 if group >= inputs else group,
        scale_kind=scale_kind(scale),
        zero_kind="none" if scheme.symmetric else "point",
        is_permuted=ordered,
        has_equal_groups=not ordered or has_equal_groups(module, "g_idx", groups),
    )
    return stored_integer_weight(module, layout, lambda row: _unpack(module, layout, groups, encoding))


def _infer_bits_and_inputs(
    module: QuantizedModule, words: int, zero_words: int, outputs: int, indexed: int | None, declared: DeclaredScheme
) -> tuple[int, int]:
    """Bits and inputs that fit all shapes."""
    fitting = []
    for bits in BITS:
        inputs = words * 32 // bits if indexed is None else indexed
        if packed_word_count(inputs, bits) == words and packed_word_count(outputs, bits) == zero_words:
            fitting.append((bits, inputs))
    found = [pair for pair in fitting if declared.bits in (None, pair[0])]
    if len(found) == 1:
        return found[0]
    said = "" if declared.bits is None else f"the configuration says {declared.bits} bits, but "
    raise module.error(f"{said}qweight has {words} rows and qzeros {zero_words} columns for {outputs} outputs")


def _unpack(module: QuantizedModule, layout: IntegerLayout, groups: int, zeros: ZeroPointEncoding) -> UnpackedIntegers:
    outputs = layout.shape[0]
    codes, nibbles = unpack_codes(module.read("qweight").T, layout)
    points = _unpack_zero_points(module.read("qzeros"), layout.bits, outputs, zeros).T
    middle = 1 << (layout.bits - 1)
    if layout.zero_kind == "none":
        if (points != middle).any():
            raise module.error(f"the configuration says symmetric, but not all zero points are {middle}")
        points = None
    return UnpackedIntegers(codes, module.read("scales").T, points, _read_group_index(module, layout, groups), nibbles)


def _read_group_index(module: QuantizedModule, layout: IntegerLayout, groups: int) -> Array | None:
    if "g_idx" not in module:
        return None
    index, inputs = read_group_index(module, "g_idx", groups), layout.shape[-1]
    if not layout.is_permuted and (index != np.arange(inputs) // (layout.group_size or inputs)).any():
        raise module.error("g_idx reorders the inputs, but the configuration says desc_act is false")
    return index


def _unpack_zero_points(words: Array, bits: int, outputs: int, zeros: ZeroPointEncoding) -> Array:
    """Zero points [G, O], int16."""
    if zeros.is_minus_one and zeros.is_modular and bits in _WORD_ALIGNED_BITS:
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        words = words.view(np.uint32) + np.uint32(ones)
        return unpack_bits(words, bits, outputs).astype(np.int16)
    points = unpack_bits(words, bits, outputs).astype(np.int16) + np.int16(zeros.is_minus_one)
    return points & np.int16((1 << bits) - 1) if zeros.is_modular else points


def _writer(section: Mapping[str, Any]) -> str:
    meta = section.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    first = writers[0] if isinstance(writers, list) and writers else writers
    return str(first).partition(":")[0].lower()
