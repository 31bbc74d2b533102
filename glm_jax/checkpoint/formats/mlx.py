"""Reads MLX checkpoints: integers with a scale and a bias per group (mode "affine"), and 4- and 8-bit floats.

The tensors are ``weight``, ``uint32 [*stack, O, I·b/32]``, and ``scales`` and ``biases``, ``[*stack, O, G]``. Some
values of 3, 5 and 6 bits are split between two words. The modes mxfp4, mxfp8 and nvfp4 have 8-bit scales and no biases.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import (
    E4M3_NAN,
    SCALE_DTYPES,
    QuantizedModule,
    StoredWeight,
    check_byte_scales,
    scale_dtype_of,
)
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight, unpack_codes
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.quant_spec import QuantDtype, ScaleDtype

BITS = (2, 3, 4, 5, 6, 8)
# mode -> bits, QuantSpec's kind of the values, QuantSpec's dtype of the scales.
_FLOAT_MODES: dict[str, tuple[int, QuantDtype, ScaleDtype]] = {
    "mxfp4": (4, "fp4", "e8m0"),
    "mxfp8": (8, "fp8", "e8m0"),
    "nvfp4": (4, "fp4", "e4m3"),
}


def read_mlx(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """Reads a module of ``weight``, ``scales`` and, in the mode "affine", ``biases``.

    Raises:
        CheckpointError: If tensors are missing, or contradict each other or the configuration.
    """
    packed_shape = module.require("weight", ("U32",)).shape
    scales = module.require("scales", (*SCALE_DTYPES, "U8"))
    bits, group_size, mode = scheme.bits, scheme.group_size, scheme.mode
    if bits is None or not group_size or mode is None:
        raise module.error("MLX's tensors need bits and group_size under quantization in config.json")
    if len(packed_shape) < 2 or scales.shape[:-1] != packed_shape[:-1]:
        raise module.error(f"scales has shape {list(scales.shape)} and weight {list(packed_shape)}")
    inputs = scales.shape[-1] * group_size
    if inputs * bits != packed_shape[-1] * 32:
        raise module.error(
            f"the configuration says {bits} bits in groups of {group_size}, but {packed_shape[-1]} words have "
            f"{scales.shape[-1]} scales"
        )
    shape = (*packed_shape[:-1], inputs)
    if mode in _FLOAT_MODES:
        return _read_float_mode(module, shape, scheme)
    if mode != "affine" or bits not in BITS:
        raise module.error(f"MLX's mode {mode} with {bits} bits is not read")
    scales = module.require("scales", tuple(SCALE_DTYPES))
    if module.require_shape("biases", tuple(SCALE_DTYPES), scales.shape).dtype != scales.dtype:
        raise module.error("biases has another dtype than scales")
    layout = IntegerLayout(shape, bits, group_size, scale_dtype_of(scales), zero_kind="bias")

    def read(index: int | None) -> UnpackedIntegers:
        codes, nibbles = unpack_codes(module.read("weight", index), layout)
        biases = module.read("biases", index)
        return UnpackedIntegers(codes, module.read("scales", index), biases, is_nibble_packed=nibbles)

    return stored_integer_weight(module, layout, read)


def _read_float_mode(module: QuantizedModule, shape: tuple[int, ...], scheme: DeclaredScheme) -> StoredWeight:
    bits, kind, scale_dtype = _FLOAT_MODES[str(scheme.mode)]
    if scheme.bits != bits:
        raise module.error(f"MLX's mode {scheme.mode} with {scheme.bits} bits is not read")
    module.require("scales", ("U8",))
    if "biases" in module:
        raise module.error(f"there are biases, which the mode {scheme.mode} does not have")
    spec = QuantSpec(kind=kind, block=(1, scheme.group_size or 0), scale=scale_dtype)

    def build(index: int | None) -> QuantizedTensor:
        codes = module.read("weight", index).view("uint8")
        if kind == "fp8" and ((codes & 0x7F) == E4M3_NAN).any():
            raise module.error("weight holds values that are not numbers: the file is damaged")
        scales = check_byte_scales(module, "scales", module.read("scales", index), scale_dtype)
        return QuantizedTensor(codes, scales, spec=spec)

    return module.stored_weight(shape, "float32", spec, build)
