"""The tests' own writers of quantized formats write what the formats' libraries wrote, bit for bit."""

import numpy as np
import pytest

from tests.builders import quantized_formats
from tests.checkpoint.formats import golden_cases

INTEGERS = [
    (file, case)
    for file in ("compressed_tensors", "gptq", "autoround", "awq")
    for case in golden_cases.load_cases(file)
]
STRAIGHT = [
    (file, case)
    for file, case in [
        *INTEGERS,
        *(("actorder", case) for case in golden_cases.load_cases("compressed_tensors_actorder")),
    ]
    if not any(odd in case.name for odd in ("int3", "int5", "int6", "wraps", "sixteen", "256"))
]


def library_integers(case):
    """Codes, zero points and scales of a case as its library has them."""
    parts = case.tensors
    inputs, groups = case.shape[1], case.scales.shape[1]
    index = parts.get("weight_g_idx", parts.get("g_idx", np.arange(inputs) // (inputs // groups)))
    return quantized_formats.QuantizedIntegers(case.codes, case.zeros.astype(np.int16), case.scales, index)


def write(file, case):
    integers, config = library_integers(case), case.config
    if "config_groups" in config:
        weights = config["config_groups"]["group_0"]["weights"]
        settings = {"symmetric": weights["symmetric"], "act_order": file == "actorder"}
        return quantized_formats.pack_compressed_tensors(integers, weights["num_bits"], **settings)
    if "awq" in case.name or file == "awq":
        return quantized_formats.pack_awq(integers)
    minus_one = config.get("checkpoint_format") == "gptq" or config.get("packing_format") == "auto_round:auto_gptq"
    return quantized_formats.pack_gptq(
        integers, config["bits"], zero_points_minus_one=minus_one, with_g_idx=file == "gptq"
    )


@pytest.mark.parametrize(("file", "case"), STRAIGHT, ids=[f"{file}-{case.name}" for file, case in STRAIGHT])
def test_integers(file, case):
    written = write(file, case)
    assert written.keys() == case.tensors.keys()
    for part, array in case.tensors.items():
        assert written[part].dtype == array.dtype
        np.testing.assert_array_equal(golden_cases.bit_patterns(written[part]), golden_cases.bit_patterns(array))
    assert golden_cases.values_sha256(library_integers(case).values) == case.sha256


@pytest.mark.parametrize(
    ("name", "outer"), [("nvfp4", ("weight_global_scale", np.divide)), ("modelopt", ("weight_scale_2", np.multiply))]
)
def test_values_of_nvfp4(name, outer):
    parts, (part, apply) = golden_cases.get_case("fp4", name).tensors, outer
    packed = parts.get("weight_packed", parts["weight"] if name == "modelopt" else None)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    np.testing.assert_array_equal(quantized_formats.pack_fp4_nibbles(codes), packed)
    scales = apply(parts["weight_scale"].astype(np.float32), parts[part].reshape(()))
    values = quantized_formats.dequantize_fp4(codes) * scales.repeat(16, 1)
    assert golden_cases.values_sha256(values) == golden_cases.get_case("fp4", name).sha256


def test_values_of_mxfp4():
    case = golden_cases.get_case("fp4", "mxfp4")
    packed = case.tensors["weight_packed"]
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    scales = np.exp2(case.tensors["weight_scale"].astype(np.float32) - 127)
    assert golden_cases.values_sha256(quantized_formats.dequantize_fp4(codes) * scales.repeat(32, 1)) == case.sha256


@pytest.mark.parametrize("form", quantized_formats.FORMATS, ids=lambda form: form.name)
def test_packed_values_are_near_the_weights(form):
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    module = form.pack(weight, 0)
    error = np.abs(module.values - weight).max() / np.abs(weight).max()
    assert 1e-5 < error < 0.2
