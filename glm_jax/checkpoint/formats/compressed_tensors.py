"""Reads compressed-tensors' ``pack-quantized``: integers of 2 to 8 bits packed along the inputs, lowest bits first.

The integers are symmetric or have zero points, which are packed along the outputs. Scales are per group, per output or
per matrix. Versions before 0.15 also wrote an activation order (``weight_g_idx``). Activation scales are ignored,
because activations are not quantized here.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import (
    SCALE_DTYPES,
    Array,
    QuantizedModule,
    StoredWeight,
    infer_block_size,
    scale_dtype_of,
)
from glm_jax.checkpoint.formats.bit_packing import packed_word_count, unpack_bits
from glm_jax.checkpoint.formats.integers import (
    IntegerLayout,
    UnpackedIntegers,
    has_equal_groups,
    read_group_index,
    stored_integer_weight,
    unpack_codes,
)
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme

BITS = range(2, 9)


def read_pack_quantized(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """Reads a module of ``weight_packed``, ``int32 [*stack, O, ⌈I·b/32⌉]``, and ``weight_scale``.

    Raises:
        CheckpointError: If tensors are missing, or contradict each other or the configuration.
    """
    packed = module.require("weight_packed", ("I32",))
    *leading, words = packed.shape
    if len(leading) not in (1, 2):
        raise module.error(f"weight_packed has shape {list(packed.shape)}, expected 2 or 3 dimensions")
    stack, outputs = tuple(leading[:-1]), leading[-1]
    scales = module.require("weight_scale", tuple(SCALE_DTYPES))
    num_groups = scales.shape[-1] if len(scales.shape) == len(packed.shape) else 1
    per_matrix = [(*stack, 1, 1)] + ([] if stack else [(), (1,)])
    if "weight_shape" in module:
        module.require_shape("weight_shape", ("I64", "I32"), (len(packed.shape),))
    inputs = _infer_inputs(module, words, num_groups, scheme)
    bits = _infer_bits(module, words, inputs, scheme)
    group_size = infer_block_size(module, inputs, num_groups, scheme.group_size, "inputs")
    scale_rows = 1 if scales.shape in per_matrix else outputs
    allowed = [(*stack, scale_rows, num_groups)] + ([*per_matrix, (*stack, outputs)] if num_groups == 1 else [])
    module.require_shape("weight_scale", tuple(SCALE_DTYPES), *allowed)
    has_zeros = _has_zero_points(module, scheme, (*stack, packed_word_count(outputs, bits), num_groups))
    permuted = "weight_g_idx" in module
    if permuted:
        module.require_shape("weight_g_idx", ("I32", "I64"), (inputs,))
    layout = IntegerLayout(
        shape=(*stack, outputs, inputs),
        bits=bits,
        group_size=group_size,
        scale_dtype=scale_dtype_of(scales),
        zero_kind="point" if has_zeros else "none",
        is_permuted=permuted,
        has_equal_groups=not permuted or has_equal_groups(module, "weight_g_idx", num_groups),
        has_row_scales=scale_rows == outputs,
        scales_suffix="weight_scale",
    )
    return stored_integer_weight(module, layout, lambda index: _unpack(module, layout, num_groups, index))


def _unpack(module: QuantizedModule, layout: IntegerLayout, num_groups: int, index: int | None) -> UnpackedIntegers:
    *stack, outputs, _ = layout.shape
    stack = stack if index is None else []
    if "weight_shape" in module and (shape := module.read("weight_shape").tolist()) != list(layout.shape):
        raise module.error(f"weight_shape says {shape}, but the other tensors make {list(layout.shape)}")
    scale_rows = outputs if layout.has_row_scales else 1
    scales = module.read("weight_scale", index if layout.shape[:-2] else None).reshape(*stack, scale_rows, num_groups)
    codes, nibbles = unpack_codes(module.read("weight_packed", index), layout)
    zeros: Array | None = None
    if layout.zero_kind == "point":
        words = module.read("weight_zero_point", index).swapaxes(-1, -2)
        zeros = unpack_bits(words, layout.bits, outputs).swapaxes(-1, -2)
    group_index = read_group_index(module, "weight_g_idx", num_groups) if layout.is_permuted else None
    return UnpackedIntegers(codes, scales, zeros, group_index, nibbles)


def _infer_inputs(module: QuantizedModule, words: int, num_groups: int, scheme: DeclaredScheme) -> int:
    """Number of inputs, from shapes alone if the configuration gives the group size."""
    if scheme.group_size:
        return num_groups * scheme.group_size
    module.require("weight_shape", ("I64", "I32"))
    # Nothing else tells how much of the last word is padding, so these two or three numbers are read right away.
    inputs = int(module.read("weight_shape")[-1])
    if not 0 < inputs <= 32 * words:
        raise module.error(f"weight_shape says {inputs} inputs, which do not fit {words} words")
    return inputs


def _infer_bits(module: QuantizedModule, words: int, inputs: int, scheme: DeclaredScheme) -> int:
    fitting = [bits for bits in BITS if packed_word_count(inputs, bits) == words]
    if scheme.kind == "float" or (scheme.bits is not None and scheme.bits not in fitting):
        declared = f"{scheme.bits}-bit {'floats' if scheme.kind == 'float' else 'integers'}"
        raise module.error(f"the configuration says {declared}, but {inputs} inputs are packed into {words} words")
    if scheme.bits is None and len(fitting) != 1:
        raise module.error(f"{words} words for {inputs} inputs do not tell the number of bits")
    return scheme.bits or fitting[0]


def _has_zero_points(module: QuantizedModule, scheme: DeclaredScheme, shape: tuple[int, ...]) -> bool:
    if "weight_zero_point" not in module:
        if scheme.symmetric is False:
            raise module.error("the configuration says asymmetric, but weight_zero_point is missing")
        return False
    if scheme.symmetric:
        raise module.error("the configuration says symmetric, but there is a weight_zero_point")
    module.require_shape("weight_zero_point", ("I32",), shape)
    return True
