"""Quantized matrices cut and turned: the values of all kinds stay what they were, bit by bit."""

import numpy as np
import pytest

from glm_jax.checkpoint.formats.reshape import slice_rows, transpose_quantized
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


def consistent(tensor):
    found = {name: (array.shape, array.dtype) for name, array in tensor.components().items()}
    assert found == tensor.spec.component_shapes(tensor.shape)


@pytest.mark.parametrize("shape", [(12, 16), (2, 12, 16), (2, 3, 10, 32)])
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_transposing(spec, shape):
    tensor = random(spec, shape)
    turned = transpose_quantized(tensor)
    consistent(turned)
    assert turned.shape == (*shape[:-2], shape[-1], shape[-2])
    np.testing.assert_array_equal(dequantize(turned), np.swapaxes(dequantize(tensor), -1, -2))
    if not spec.permuted:
        assert turned.spec.block == spec.block[::-1]
        again = transpose_quantized(turned)
        assert again.spec == spec
        for name, array in tensor.components().items():
            np.testing.assert_array_equal(getattr(again, name), array)


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 4), (4, 8), (8, 12), (3, 4), (1, 11), (8, 11)])
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_cutting_rows(spec, start, stop):
    tensor = random(spec, (2, 12, 16))
    part = slice_rows(tensor, start, stop)
    consistent(part)
    np.testing.assert_array_equal(dequantize(part), dequantize(tensor)[:, start:stop])


def test_a_cut_along_blocks_keeps_them():
    tensor = random(QuantSpec(kind="fp8", block=(4, 8), scale="float32"), (12, 16))
    assert slice_rows(tensor, 4, 12).spec == tensor.spec
    assert slice_rows(tensor, 4, 12).scales.shape == (2, 2)
    across = slice_rows(tensor, 2, 12)
    assert across.spec.block == (1, 8)
    assert across.scales.shape == (10, 2)


def test_what_cannot_be_cut_or_turned():
    tensor = random(SPECS[0], (5, 16))
    with pytest.raises(QuantError, match="4-bit codes of 5 outputs cannot be packed in pairs"):
        transpose_quantized(tensor)
    for start, stop in ((0, 6), (-1, 2), (3, 3)):
        with pytest.raises(QuantError, match=f"a matrix with 5 outputs has no outputs {start} to {stop}"):
            slice_rows(tensor, start, stop)
