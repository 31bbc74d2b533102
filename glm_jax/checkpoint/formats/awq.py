"""AWQ, version gemm, and AutoRound's layout of the same kind: integers along the outputs, runs of eight interleaved.

``qweight`` int32 [I, O·b/32], ``qzeros`` int32 [G, O·b/32], ``scales`` [G, O]; zero points are stored as they are.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import SCALE_DTYPES, QuantizedModule, StoredWeight, infer_block_size, scale_kind
from glm_jax.checkpoint.formats.bit_packing import (
    AWQ_REVERSE_ORDER,
    packed_word_count,
    reorder_awq_columns,
    repack_awq_nibbles,
    unpack_bits,
)
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme, QuantizationConfig

BITS = range(4, 8)


def unsupported_awq_layout(description: QuantizationConfig) -> str | None:
    """Why such a file is not read, or None if it is."""
    section, method = description.section, description.quant_method
    if method == "auto-round":
        said, known = description.packing_format, ("auto_round:auto_awq",)
    elif method == "awq":
        keys = ("version", "format", "checkpoint_format")
        said, known = str(next((section[key] for key in keys if section.get(key)), "gemm")).lower(), ("gemm",)
    else:
        return f"the configuration describes {method or 'no quantization'}, but the tensors are AWQ's"
    return None if said in known else f"AWQ's layout {said} is not read (known is {known[0]})"


def read_awq(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """A module of ``qweight``, ``qzeros`` and ``scales``.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    inputs, words = module.require("qweight", ("I32",), 2).shape
    scale = module.require("scales", tuple(SCALE_DTYPES), 2)
    groups, outputs = scale.shape
    module.require_shape("qzeros", ("I32",), (groups, words))
    fitting = [bits for bits in BITS if packed_word_count(outputs, bits) == words and scheme.bits in (None, bits)]
    if len(fitting) != 1 or outputs % len(AWQ_REVERSE_ORDER):
        said = f" of {scheme.bits} bits" if scheme.bits else ""
        raise module.error(f"{outputs} outputs{said} are not packed into {words} words")
    layout = IntegerLayout(
        shape=(outputs, inputs),
        bits=fitting[0],
        group_size=infer_block_size(module, inputs, groups, scheme.group_size, "inputs"),
        scale_kind=scale_kind(scale),
        zero_kind="none" if scheme.symmetric else "point",
    )
    return stored_integer_weight(module, layout, lambda row: _unpack(module, layout))


def _unpack(module: QuantizedModule, layout: IntegerLayout) -> UnpackedIntegers:
    outputs, bits = layout.shape[0], layout.bits
    nibbles, words = bits == 4 and layout.spec is not None, module.read("qweight")
    codes = repack_awq_nibbles(words) if nibbles else reorder_awq_columns(unpack_bits(words, bits, outputs)).T
    zeros = reorder_awq_columns(unpack_bits(module.read("qzeros"), bits, outputs)).T
    if layout.zero_kind == "none":
        middle = 1 << (bits - 1)
        if (zeros != middle).any():
            raise module.error(f"the configuration says symmetric, but not all zero points are {middle}")
        zeros = None
    return UnpackedIntegers(codes, module.read("scales").T, zeros, is_nibble_packed=nibbles)
