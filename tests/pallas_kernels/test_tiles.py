"""The layout of tiles: every code where it belongs, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.weights import QuantizedTensor, QuantSpec, dequantize, quantize, tile_weight, untile_weight
from pallas_kernels.tiles import BITS_PER_QVALUE, CHUNK_ROWS, TILE_WIDTH, chunk_inputs, unpack_qvalues
from tests.pallas_kernels.builders import make_random_tiles
from tests.pallas_kernels.references import dequantize_tiles, make_tiles

UNSIGNED = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}


@pytest.mark.parametrize("kind", BITS_PER_QVALUE)
def test_a_code_lies_where_the_docstring_says(kind):
    """Code i of word r of chunk c of tile t is input c * chunk + 16 i + r of output 64 t + column."""
    rng, bits, size = np.random.default_rng(0), BITS_PER_QVALUE[kind], chunk_inputs(kind)
    codes = rng.integers(0, 1 << bits, (2 * TILE_WIDTH, 2 * size), dtype=np.uint64).astype(UNSIGNED[bits])
    words = np.asarray(make_tiles(jnp.asarray(codes), kind).packed)
    assert words.shape == (2, 2, CHUNK_ROWS, TILE_WIDTH)
    for t, c, r, column, i in [(0, 0, 0, 0, 0), (1, 1, 15, 63, 32 // bits - 1), (1, 0, 7, 30, 0), (0, 1, 3, 5, 0)]:
        code = int(words[t, c, r, column]) >> (bits * i) & ((1 << bits) - 1)
        assert code == codes[TILE_WIDTH * t + column, c * size + CHUNK_ROWS * i + r]


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in BITS_PER_QVALUE if BITS_PER_QVALUE[kind] < 16]),
    stack=st.sampled_from([(), (2,), (2, 3)]),
    outputs=st.integers(1, 140),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 48, 64, 128]),
)
def test_codes_and_scales_come_back(kind, stack, outputs, groups, group):
    rng = np.random.default_rng([outputs, groups, group])
    inputs = groups * group
    codes = rng.integers(0, 1 << BITS_PER_QVALUE[kind], (*stack, outputs, inputs)).astype(np.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (*stack, outputs, groups)), jnp.bfloat16)
    made = make_tiles(jnp.asarray(codes), kind, scales, scales.astype(jnp.float32))
    assert made.shape == codes.shape
    np.testing.assert_array_equal(unpack_qvalues(made), codes)
    np.testing.assert_array_equal(made.row_scales(), scales)
    np.testing.assert_array_equal(made.row_offsets(), scales.astype(jnp.float32))


SPECS = [
    QuantSpec(kind="int4", block=(1, 64)),
    QuantSpec(kind="int4", block=(1, 32), zero="point", scale="float16"),
    QuantSpec(kind="int8", block=(1, 0)),
    QuantSpec(kind="int8", block=(1, 16), zero="point"),
    QuantSpec(kind="fp8", block=(64, 64), scale="float32"),
    QuantSpec(kind="fp8", block=(0, 0), scale="float32"),
    QuantSpec(kind="fp4", block=(1, 32), scale="e8m0"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_keeps_its_values(spec, turned):
    rng = np.random.default_rng(0)
    weight = quantize(jnp.asarray(rng.standard_normal((2, 128, 192)), jnp.float32), spec, "rtn")
    made = tile_weight(weight, transposed=turned)
    if turned and (spec.block[0] != 1 or spec.zero != "none" or spec.block[1] % TILE_WIDTH):
        assert made is None
        return
    assert made.shape == weight.shape
    np.testing.assert_allclose(made.to_float32(), dequantize(weight), rtol=1e-6)
    back = untile_weight(made)
    np.testing.assert_array_equal(back.codes, weight.codes)
    np.testing.assert_allclose(dequantize(back), dequantize(weight), rtol=1e-6)


def test_biases_come_back():
    rng = np.random.default_rng(0)
    spec = QuantSpec(kind="int4", block=(1, 32), zero="bias", scale="float32")
    parts = {name: (shape, dtype) for name, (shape, dtype) in spec.component_shapes((64, 96)).items()}
    codes = rng.integers(0, 256, parts["codes"][0]).astype(np.uint8)
    scales, zeros = (jnp.asarray(rng.standard_normal(parts[name][0]), jnp.float32) for name in ("scales", "zeros"))
    weight = QuantizedTensor(jnp.asarray(codes), scales, zeros, spec=spec)
    back = untile_weight(tile_weight(weight))
    np.testing.assert_array_equal(back.zeros, zeros)
    np.testing.assert_array_equal(dequantize(back), dequantize(weight))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_weights(dtype):
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((3, 70, 40)), dtype)
    for turned in (False, True):
        made = tile_weight(weight, transposed=turned)
        assert (made.shape, made.dtype) == (weight.shape, weight.dtype)
        np.testing.assert_array_equal(untile_weight(made), weight)
        np.testing.assert_array_equal(np.asarray(made[1]), weight[1].astype(jnp.float32))


@pytest.mark.parametrize(
    "weight",
    [
        jax.ShapeDtypeStruct((4, 64, 64), jnp.float16),
        QuantizedTensor(
            np.zeros((64, 32), np.uint8),
            np.ones((64, 8), np.float32),
            spec=QuantSpec(kind="int4", block=(1, 8), scale="float32"),
        ),
    ],
    ids=["float16", "groups of 8"],
)
def test_what_no_kernel_reads_stays_as_it_is(weight):
    assert tile_weight(weight) is None


def test_bytes_without_padding_are_those_of_the_weight():
    weight = quantize(jnp.ones((2, 128, 256)), QuantSpec(kind="int4"), "rtn")
    assert tile_weight(weight).nbytes == weight.nbytes


@pytest.mark.parametrize("kind", BITS_PER_QVALUE)
def test_values_are_finite(kind):
    assert np.isfinite(dequantize_tiles(make_random_tiles(np.random.default_rng(0), (70, 48), kind))).all()
