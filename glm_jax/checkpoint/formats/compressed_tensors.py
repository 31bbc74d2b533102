"""compressed-tensors ``pack-quantized``: integers of 2 to 8 bits along the inputs, from the lowest bits on.

Symmetric or with zero points (packed along the outputs), scales per group, output or matrix, and the activation order
that versions before 0.15 wrote (``weight_g_idx``). Scales of activations are ignored, like all others here: they
quantize what goes in, and products here take activations as they are.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import (
    SCALE_DTYPES,
    Array,
    QuantizedModule,
    StoredWeight,
    infer_block_size,
    scale_kind,
)
from glm_jax.checkpoint.formats.bit_packing import packed_word_count, unpack_bits
from glm_jax.checkpoint.formats.groups import has_equal_groups, read_group_index
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight, unpack_codes
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme

BITS = range(2, 9)


def read_pack_quantized(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """A module of ``weight_packed`` (int32) and ``weight_scale``.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    packed = module.require("weight_packed", ("I32",))
    *leading, words = packed.shape
    if len(leading) not in (1, 2):
        raise module.error(f"weight_packed has shape {list(packed.shape)}, expected 2 or 3 dimensions")
    stack, outputs = tuple(leading[:-1]), leading[-1]
    scale = module.require("weight_scale", tuple(SCALE_DTYPES))
    groups = scale.shape[-1] if len(scale.shape) == len(packed.shape) else 1
    per_matrix = [(*stack, 1, 1)] + ([] if stack else [(), (1,)])
    if "weight_shape" in module:
        module.require_shape("weight_shape", ("I64", "I32"), (len(packed.shape),))
    inputs = _infer_inputs(module, words, groups, scheme)
    bits = _infer_bits(module, words, inputs, scheme)
    group = infer_block_size(module, inputs, groups, scheme.group_size, "inputs")
    rows = 1 if scale.shape in per_matrix else outputs
    allowed = [(*stack, rows, groups)] + ([*per_matrix, (*stack, outputs)] if groups == 1 else [])
    module.require_shape("weight_scale", tuple(SCALE_DTYPES), *allowed)
    zero = _has_zero_points(module, scheme, (*stack, packed_word_count(outputs, bits), groups))
    ordered = "weight_g_idx" in module
    if ordered:
        module.require_shape("weight_g_idx", ("I32", "I64"), (inputs,))
    layout = IntegerLayout(
        shape=(*stack, outputs, inputs),
        bits=bits,
        group_size=group,
        scale_kind=scale_kind(scale),
        zero_kind="point" if zero else "none",
        is_permuted=ordered,
        has_equal_groups=not ordered or has_equal_groups(module, "weight_g_idx", groups),
        has_row_scales=rows == outputs,
        scales_suffix="weight_scale",
    )
    return stored_integer_weight(module, layout, lambda row: _unpack(module, layout, groups, row))


def _unpack(module: QuantizedModule, layout: IntegerLayout, groups: int, row: int | None) -> UnpackedIntegers:
    *stack, outputs, _ = layout.shape
    stack = stack if row is None else []
    if "weight_shape" in module and (shape := module.read("weight_shape").tolist()) != list(layout.shape):
        raise module.error(f"weight_shape says {shape}, but the other tensors make {list(layout.shape)}")
    rows = outputs if layout.has_row_scales else 1
    scales = module.read("weight_scale", row if layout.shape[:-2] else None).reshape(*stack, rows, groups)
    codes, nibbles = unpack_codes(module.read("weight_packed", row), layout)
    zeros: Array | None = None
    if layout.zero_kind == "point":
        words = module.read("weight_zero_point", row).swapaxes(-1, -2)
        zeros = unpack_bits(words, layout.bits, outputs).swapaxes(-1, -2)
    index = read_group_index(module, "weight_g_idx", groups) if layout.is_permuted else None
    return UnpackedIntegers(codes, scales, zeros, index, nibbles)


def _infer_inputs(module: QuantizedModule, words: int, groups: int, declared: DeclaredScheme) -> int:
    """Width of the matrix, from shapes alone where they tell it."""
    if declared.group_size:
        return groups * declared.group_size
    module.require("weight_shape", ("I64", "I32"))
    # Two or three numbers, read where nothing else says how much of the last word is padding.
    inputs = int(module.read("weight_shape")[-1])
    if not 0 < inputs <= 32 * words:
        raise module.error(f"weight_shape says {inputs} inputs, which do not fit {words} words")
    return inputs


def _infer_bits(module: QuantizedModule, words: int, inputs: int, declared: DeclaredScheme) -> int:
    fitting = [bits for bits in BITS if packed_word_count(inputs, bits) == words]
    if declared.kind == "float" or (declared.bits is not None and declared.bits not in fitting):
        said = f"{declared.bits}-bit {'floats' if declared.kind == 'float' else 'integers'}"
        raise module.error(f"the configuration says {said}, but {inputs} inputs are packed into {words} words")
    if declared.bits is None and len(fitting) != 1:
        raise module.error(f"{words} words for {inputs} inputs do not tell the number of bits")
    return declared.bits or fitting[0]


def _has_zero_points(module: QuantizedModule, declared: DeclaredScheme, shape: tuple[int, ...]) -> bool:
    if "weight_zero_point" not in module:
        if declared.symmetric is False:
            raise module.error("the configuration says asymmetric, but weight_zero_point is missing")
        return False
    if declared.symmetric:
        raise module.error("the configuration says symmetric, but there is a weight_zero_point")
    module.require_shape("weight_zero_point", ("I32",), shape)
    return True
