"""Reshaped quantized matrices: the values of every kind stay the same, bit for bit."""

import numpy as np
import pytest

from glm_jax.checkpoint.formats.reshape import expand_row_scales, transpose_quantized, undo_permutation
from glm_jax.errors import QuantError
from glm_jax.weights import QuantizedTensor, QuantSpec, dequantize

SPECS = [
    QuantSpec(kind="int4", block=(1, 8), scale="float16"),
    QuantSpec(kind="int4", block=(1, 8), scale="float16", zero="point"),
    QuantSpec(kind="int4", block=(1, 8), scale="bfloat16", zero="bias"),
    QuantSpec(kind="int4", block=(1, 8), scale="float32", zero="point", permuted=True),
    QuantSpec(kind="int4", block=(1, 0), scale="float32"),
    QuantSpec(kind="int8", block=(1, 0), scale="bfloat16"),
    QuantSpec(kind="int8", block=(4, 1), scale="bfloat16", zero="point"),
    QuantSpec(kind="int8", block=(0, 0), scale="float32", permuted=True),
    QuantSpec(kind="int8", block=(1, 4), scale="float32", zero="bias"),
    QuantSpec(kind="fp8", block=(4, 8), scale="float32"),
    QuantSpec(kind="fp8", block=(5, 7), scale="e8m0"),
    QuantSpec(kind="fp8", block=(0, 0), scale="float32"),
    QuantSpec(kind="fp4", block=(1, 8), scale="e4m3", outer="divide"),
    QuantSpec(kind="fp4", block=(1, 16), scale="e8m0"),
]


def random(spec, shape, seed=0):
    rng = np.random.default_rng(seed)
    parts = {}
    for name, (size, dtype) in spec.component_shapes(shape).items():
        if name == "permutation":
            flat = [rng.permutation(size[-1]) for _ in range(int(np.prod(size[:-1])))]
            parts[name] = np.array(flat, np.int32).reshape(size)
        elif name == "codes":
            parts[name] = rng.integers(0, 127, size).astype(dtype)
        elif name == "zeros" and spec.zero == "point":
            parts[name] = rng.integers(0, 17, size).astype(dtype)
        elif dtype == np.uint8:
            parts[name] = rng.integers(100, 126, size).astype(dtype)
        else:
            parts[name] = rng.uniform(0.5, 2, size).astype(dtype)
    return QuantizedTensor(**parts, spec=spec)


def assert_components_fit_spec(tensor):
    actual = {name: (array.shape, array.dtype) for name, array in tensor.components().items()}
    assert actual == tensor.spec.component_shapes(tensor.shape)


@pytest.mark.parametrize("shape", [(12, 16), (2, 12, 16), (2, 3, 10, 32)])
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_transposing(spec, shape):
    tensor = random(spec, shape)
    transposed = transpose_quantized(tensor)
    assert_components_fit_spec(transposed)
    assert transposed.shape == (*shape[:-2], shape[-1], shape[-2])
    np.testing.assert_array_equal(dequantize(transposed), np.swapaxes(dequantize(tensor), -1, -2))
    if not spec.permuted:
        assert transposed.spec.block == spec.block[::-1]
        again = transpose_quantized(transposed)
        assert again.spec == spec
        for name, array in tensor.components().items():
            np.testing.assert_array_equal(getattr(again, name), array)


@pytest.mark.parametrize("shape", [(12, 16), (2, 11, 16)])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.block[0] > 1], ids=lambda spec: spec.name)
def test_a_scale_for_every_output(spec, shape):
    tensor = random(spec, shape)
    expanded = expand_row_scales(tensor)
    assert_components_fit_spec(expanded)
    assert expanded.spec.block == (1, spec.block[1])
    np.testing.assert_array_equal(dequantize(expanded), dequantize(tensor))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.permuted], ids=lambda spec: spec.name)
def test_columns_in_the_order_of_the_inputs(spec):
    tensor = random(spec, (2, 12, 16))
    ordered = undo_permutation(tensor)
    assert_components_fit_spec(ordered)
    assert not ordered.spec.permuted
    np.testing.assert_array_equal(dequantize(ordered), dequantize(tensor))


def test_an_odd_number_of_outputs_cannot_be_transposed():
    tensor = random(SPECS[0], (5, 16))
    with pytest.raises(QuantError, match="4-bit codes of 5 outputs cannot be packed in pairs"):
        transpose_quantized(tensor)
