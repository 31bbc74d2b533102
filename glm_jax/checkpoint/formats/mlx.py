"""MLX: integers with a scale and a bias per group ("affine"), and its small floats.

``weight`` uint32 [*stack, O, I·b/32], ``scales`` and ``biases`` [*stack, O, I/g]; of 3, 5 and 6 bits a value may lie in
two words. The modes mxfp4, mxfp8 and nvfp4 have 8-bit scales and no biases.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import SCALE_DTYPES, QuantizedModule, StoredWeight, check_byte_scales, scale_kind
from glm_jax.checkpoint.formats.integers import IntegerLayout, UnpackedIntegers, stored_integer_weight, unpack_codes
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.quant_spec import QuantDtype, ScaleDtype

BITS = (2, 3, 4, 5, 6, 8)
# mode -> bits, kind of the codes, kind of the scales.
_FLOAT_MODES: dict[str, tuple[int, QuantDtype, ScaleDtype]] = {
    "mxfp4": (4, "fp4", "e8m0"),
    "mxfp8": (8, "fp8", "e8m0"),
    "nvfp4": (4, "fp4", "e4m3"),
}


def read_mlx(module: QuantizedModule, scheme: DeclaredScheme) -> StoredWeight:
    """A module of ``weight`` (uint32), ``scales`` and, where it is affine, ``biases``.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    packed = module.require("weight", ("U32",)).shape
    scales = module.require("scales", (*SCALE_DTYPES, "U8"))
    bits, group, mode = scheme.bits, scheme.group_size, scheme.mode
    if bits is None or not group or mode is None:
        raise module.error("MLX's tensors need bits and group_size under quantization in config.json")
    if len(packed) < 2 or scales.shape[:-1] != packed[:-1]:
        raise module.error(f"scales has shape {list(scales.shape)} and weight {list(packed)}")
    inputs = scales.shape[-1] * group
    if inputs * bits != packed[-1] * 32:
        raise module.error(
            f"the configuration says {bits} bits in groups of {group}, but {packed[-1]} words have "
            f"{scales.shape[-1]} scales"
        )
    shape = (*packed[:-1], inputs)
    if mode in _FLOAT_MODES:
        return _read_float_mode(module, shape, scheme)
    if mode != "affine" or bits not in BITS:
        raise module.error(f"MLX's mode {mode} with {bits} bits is not read")
    scales = module.require("scales", tuple(SCALE_DTYPES))
    if module.require_shape("biases", tuple(SCALE_DTYPES), scales.shape).dtype != scales.dtype:
        raise module.error("biases has another dtype than scales")
    layout = IntegerLayout(shape, bits, group, scale_kind(scales), zero_kind="bias")

    def read(row: int | None) -> UnpackedIntegers:
        codes, nibbles = unpack_codes(module.read("weight", row), layout)
        return UnpackedIntegers(codes, module.read("scales", row), module.read("biases", row), is_nibble_packed=nibbles)

    return stored_integer_weight(module, layout, read)


def _read_float_mode(module: QuantizedModule, shape: tuple[int, ...], declared: DeclaredScheme) -> StoredWeight:
    bits, kind, scale = _FLOAT_MODES[str(declared.mode)]
    if declared.bits != bits:
        raise module.error(f"MLX's mode {declared.mode} with {declared.bits} bits is not read")
    module.require("scales", ("U8",))
    if "biases" in module:
        raise module.error(f"there are biases, which the mode {declared.mode} does not have")
    spec = QuantSpec(kind=kind, block=(1, declared.group_size or 0), scale=scale)

    def build(row: int | None) -> QuantizedTensor:
        codes = module.read("weight", row).view("uint8")
        if kind == "fp8" and ((codes & 0x7F) == 0x7F).any():
            raise module.error("weight holds values that are not numbers: the file is damaged")
        scales = check_byte_scales(module, "scales", module.read("scales", row), scale)
        return QuantizedTensor(codes, scales, spec=spec)

    return module.stored_weight(shape, "float32", spec, build)
