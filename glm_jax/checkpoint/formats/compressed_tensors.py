"""compressed-tensors ``pack-quantized``: integers of 2 to 8 bits along the inputs, from the lowest bits on.

Symmetric or with zero points (packed along the outputs), scales per group, output or matrix, and the activation order
that versions before 0.15 wrote (``weight_g_idx``). Scales of activations are ignored, like all others here: they
quantise what goes in, and products here take activations as they are.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import SCALES, Array, Module, Stored, block_size, scale_kind
from glm_jax.checkpoint.formats.bit_packing import unpack, word_count
from glm_jax.checkpoint.formats.groups import equal_groups, read_groups
from glm_jax.checkpoint.formats.integers import Integers, Layout, stored_integers, unpack_codes
from glm_jax.checkpoint.formats.quantization_config import Declared

BITS = range(2, 9)


def read_packed(module: Module, declared: Declared) -> Stored:
    """A module of ``weight_packed`` (int32) and ``weight_scale``.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    packed = module.need("weight_packed", ("I32",))
    *leading, words = packed.shape
    if len(leading) not in (1, 2):
        raise module.error(f"weight_packed has shape {list(packed.shape)}, expected 2 or 3 dimensions")
    stack, outputs = tuple(leading[:-1]), leading[-1]
    scale = module.need("weight_scale", tuple(SCALES))
    groups = scale.shape[-1] if len(scale.shape) == len(packed.shape) else 1
    per_matrix = [(*stack, 1, 1)] + ([] if stack else [(), (1,)])
    if "weight_shape" in module:
        module.need_shape("weight_shape", ("I64", "I32"), (len(packed.shape),))
    inputs = _inputs(module, words, groups, declared)
    bits = _bits(module, words, inputs, declared)
    group = block_size(module, inputs, groups, declared.group, "inputs")
    rows = 1 if scale.shape in per_matrix else outputs
    allowed = [(*stack, rows, groups)] + ([*per_matrix, (*stack, outputs)] if groups == 1 else [])
    module.need_shape("weight_scale", tuple(SCALES), *allowed)
    zero = _zero(module, declared, (*stack, word_count(outputs, bits), groups))
    ordered = "weight_g_idx" in module
    if ordered:
        module.need_shape("weight_g_idx", ("I32", "I64"), (inputs,))
    layout = Layout(
        shape=(*stack, outputs, inputs),
        bits=bits,
        group=group,
        scale=scale_kind(scale),
        zero="point" if zero else "none",
        permuted=ordered,
        regular=not ordered or equal_groups(module, "weight_g_idx", groups),
        row_scales=rows == outputs,
        scales="weight_scale",
    )
    return stored_integers(module, layout, lambda row: _unpack(module, layout, groups, row))


def _unpack(module: Module, layout: Layout, groups: int, row: int | None) -> Integers:
    *stack, outputs, _ = layout.shape
    stack = stack if row is None else []
    if "weight_shape" in module and (shape := module.read("weight_shape").tolist()) != list(layout.shape):
        raise module.error(f"weight_shape says {shape}, but the other tensors make {list(layout.shape)}")
    rows = outputs if layout.row_scales else 1
    scales = module.read("weight_scale", row if layout.shape[:-2] else None).reshape(*stack, rows, groups)
    codes, nibbles = unpack_codes(module.read("weight_packed", row), layout)
    zeros: Array | None = None
    if layout.zero == "point":
        words = module.read("weight_zero_point", row).swapaxes(-1, -2)
        zeros = unpack(words, layout.bits, outputs).swapaxes(-1, -2)
    index = read_groups(module, "weight_g_idx", groups) if layout.permuted else None
    return Integers(codes, scales, zeros, index, nibbles)


def _inputs(module: Module, words: int, groups: int, declared: Declared) -> int:
    """Width of the matrix, from shapes alone where they tell it."""
    if declared.group:
        return groups * declared.group
    module.need("weight_shape", ("I64", "I32"))
    # Two or three numbers, read where nothing else says how much of the last word is padding.
    inputs = int(module.read("weight_shape")[-1])
    if not 0 < inputs <= 32 * words:
        raise module.error(f"weight_shape says {inputs} inputs, which do not fit {words} words")
    return inputs


def _bits(module: Module, words: int, inputs: int, declared: Declared) -> int:
    fitting = [bits for bits in BITS if word_count(inputs, bits) == words]
    if declared.kind == "float" or (declared.bits is not None and declared.bits not in fitting):
        said = f"{declared.bits}-bit {'floats' if declared.kind == 'float' else 'integers'}"
        raise module.error(f"the configuration says {said}, but {inputs} inputs are packed into {words} words")
    if declared.bits is None and len(fitting) != 1:
        raise module.error(f"{words} words for {inputs} inputs do not tell the number of bits")
    return declared.bits or fitting[0]


def _zero(module: Module, declared: Declared, shape: tuple[int, ...]) -> bool:
    if "weight_zero_point" not in module:
        if declared.symmetric is False:
            raise module.error("the configuration says asymmetric, but weight_zero_point is missing")
        return False
    if declared.symmetric:
        raise module.error("the configuration says symmetric, but there is a weight_zero_point")
    module.need_shape("weight_zero_point", ("I32",), shape)
    return True
