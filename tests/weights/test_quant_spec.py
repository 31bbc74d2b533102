"""Quantization specs: validation, shapes, bytes and text."""

import json

import numpy as np
import pytest

from glm_jax.errors import QuantError
from glm_jax.weights import QuantSpec
from tests.builders.quantized_tensors import QUANT_SPECS


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=lambda spec: spec.name.replace(" ", "-"))
def test_json_round_trip(spec):
    assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert hash(spec) == hash(QuantSpec.from_json(spec.to_json()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "int3"}, "kind must be one of int4, int8, fp8, fp4"),
        ({"kind": "int4", "scale": "float64"}, "scale must be one of"),
        ({"kind": "int4", "zero": "half"}, "zero must be one of none, point, bias"),
        ({"kind": "int4", "outer": "add"}, "outer must be one of"),
        ({"kind": "int4", "block": [1]}, "block must be two whole numbers"),
        ({"kind": "int4", "block": [1, -64]}, "block must be two whole numbers"),
        ({"kind": "int4", "block": [1, 64.0]}, "block must be two whole numbers"),
        ({"kind": "int4", "block": 64}, "block must be"),
        ({"kind": "int4", "permuted": 1}, "permuted must be true or false"),
        ({"kind": "fp8", "zero": "point"}, "only integers"),
        ({"kind": "int4", "zero": "point", "scale": "e8m0"}, "only integers with 16- or 32-bit scales"),
        ({"kind": "int4", "bits": 4}, "a quantization has"),
        ({}, "a quantization has"),
        ("int4", "a quantization has"),
    ],
)
def test_impossible_specs_are_refused(fields, words):
    with pytest.raises(QuantError, match=words):
        QuantSpec.from_json(fields)


def test_components_of_a_stack():
    spec = QuantSpec(kind="int4", block=(1, 64), zero="point", permuted=True)
    assert spec.component_shapes((2, 8, 16, 128)) == {
        "codes": ((2, 8, 16, 64), np.dtype(np.uint8)),
        "scales": ((2, 8, 16, 2), spec.scale_dtype),
        "zeros": ((2, 8, 16, 2), np.dtype(np.uint8)),
        "permutation": ((2, 8, 128), np.dtype(np.int32)),
    }
    blocks = QuantSpec(kind="fp8", block=(128, 128), scale="float32", outer="multiply")
    assert blocks.component_shapes((300, 130))["scales"] == ((3, 2), np.dtype(np.float32))
    assert blocks.component_shapes((300, 130))["outer"] == ((), np.dtype(np.float32))


def test_bytes_per_weight_of_the_usual_groups():
    shape = (1536, 2048)
    weights = 1536 * 2048
    assert QuantSpec(kind="int4", block=(1, 64)).nbytes(shape) / weights == 0.5 + 2 / 64
    assert QuantSpec(kind="int8", block=(1, 0)).nbytes(shape) / weights == 1 + 2 / 2048
    assert QuantSpec(kind="fp4", block=(1, 32), scale="e8m0").nbytes(shape) / weights == 0.5 + 1 / 32


@pytest.mark.parametrize("shape", [(7,), (4, 7)])
def test_a_shape_that_does_not_pack_is_refused(shape):
    with pytest.raises(QuantError, match="packs 2 inputs to a byte"):
        QuantSpec(kind="int4").component_shapes(shape)
