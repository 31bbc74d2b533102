"""Reads AWQ checkpoints (version ``gemm``) and AutoRound's variant: integers along the outputs, reordered by eights.

The tensors are ``qweight``, ``int32 [I, O·b/32]``, ``qzeros``, ``int32 [G, O·b/32]``, and ``scales``, ``[G, O]``. Zero
points are stored without an offset. ``formats/bit_packing.py`` unpacks the nibbles and undoes the interleaving.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import (
    SCALE_DTYPES,
    QuantizedModule,
    StoredWeight,
    infer_block_size,
    scale_dtype_of,
)
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


def unsupported_awq_layout(config: QuantizationConfig) -> str | None:
    """Reason why AWQ tensors under this configuration are not read, or None if they are."""
    section, method = config.section, config.quant_method
    if method == "auto-round":
        layout, supported = config.packing_format, "auto_round:auto_awq"
    elif method == "awq":
        keys = ("version", "format", "checkpoint_format")
        layout, supported = str(next((section[key] for key in keys if section.get(key)), "gemm")).lower(), "gemm"
    else:
        return f"the configuration describes {method or 'no quantization'}, but the tensors are AWQ's"
    return None if layout == supported else f"AWQ's layout {layout} is not read (known is {supported})"


def read_awq(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """Reads a module of ``qweight``, ``qzeros`` and ``scales``.

    Raises:
        CheckpointError: If tensors are missing, or contradict each other or the configuration.
    """
    inputs, words = module.require("qweight", ("I32",), 2).shape
    scales = module.require("scales", tuple(SCALE_DTYPES), 2)
    num_groups, outputs = scales.shape
    module.require_shape("qzeros", ("I32",), (num_groups, words))
    fitting = [bits for bits in BITS if packed_word_count(outputs, bits) == words and scheme.bits in (None, bits)]
    if len(fitting) != 1 or outputs % len(AWQ_REVERSE_ORDER):
        declared = f" of {scheme.bits} bits" if scheme.bits else ""
        raise module.error(f"{outputs} outputs{declared} are not packed into {words} words")
    layout = IntegerLayout(
        shape=(outputs, inputs),
        bits=fitting[0],
        group_size=infer_block_size(module, inputs, num_groups, scheme.group_size, "inputs"),
        scale_dtype=scale_dtype_of(scales),
        zero_kind="none" if scheme.symmetric else "point",
    )
    return stored_integer_weight(module, layout, lambda _: _unpack(module, layout))


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
