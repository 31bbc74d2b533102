"""Dequantization: every kind of codes and scales against the formulas, in NumPy and JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from glm_jax.weights import QuantizedTensor, dequantize, pack_nibbles, unpack_nibbles
from glm_jax.weights.codes import decode_e2m1, decode_e4m3, decode_e8m0
from tests.builders.quantized_tensors import E2M1_VALUES, QUANT_SPECS, dequantized_values, random_quantized_tensor

BYTES = np.arange(256, dtype=np.uint8)


def named(spec):
    return spec.name.replace(" ", "-")


def on_device(tensor):
    return tensor.map_components(lambda _, array: jnp.asarray(array))


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=named)
@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 6, 12), (5, 12), (7, 24)])
def test_values_are_those_of_the_formulas(spec, shape):
    tensor = random_quantized_tensor(spec, shape, seed=sum(shape))
    made, expected = dequantize(tensor), dequantized_values(tensor)
    assert made.dtype == np.float32
    # At most three roundings to float32: of the scale, the product and the sum.
    assert np.abs(made - expected).max() <= 3 * 2.0**-24 * np.abs(expected).max()
    on_jax = np.asarray(jax.jit(dequantize)(on_device(tensor)))
    assert np.abs(on_jax - expected).max() <= 4 * 2.0**-24 * np.abs(expected).max()


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=named)
def test_shape_bytes_and_array(spec):
    tensor = random_quantized_tensor(spec, (2, 3, 6, 12))
    assert (tensor.shape, tensor.ndim, tensor.size) == ((2, 3, 6, 12), 4, 432)
    assert tensor.nbytes == spec.nbytes(tensor.shape) == sum(array.nbytes for array in jax.tree.leaves(tensor))
    assert np.array_equal(np.asarray(tensor), dequantize(tensor))
    assert np.array_equal(np.asarray(tensor, np.float16), dequantize(tensor).astype(np.float16))


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=named)
def test_an_entry_of_the_stack_is_the_entry_of_the_values(spec):
    tensor = random_quantized_tensor(spec, (2, 3, 6, 12))
    assert np.array_equal(dequantize(tensor[1]), dequantize(tensor)[1])
    assert np.array_equal(dequantize(tensor[1, 2]), dequantize(tensor)[1, 2])
    with pytest.raises(IndexError, match="no stack axis"):
        tensor[1, 2][0]


def test_it_is_a_pytree_with_a_static_spec():
    tensor = random_quantized_tensor(QUANT_SPECS[0], (2, 6, 12))
    leaves, treedef = jax.tree.flatten(tensor)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, QuantizedTensor)
    assert (again.spec, again.dtype) == (tensor.spec, tensor.dtype)
    other = random_quantized_tensor(QUANT_SPECS[5], (2, 6, 12))
    assert jax.tree.structure(other) != treedef


@given(
    arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda n: 2 * n)), elements=st.integers(0, 15)
    )
)
def test_nibbles_round_trip(codes):
    packed = pack_nibbles(codes)
    assert packed.shape == (codes.shape[0], codes.shape[1] // 2)
    assert np.array_equal(unpack_nibbles(packed), codes)
    assert np.array_equal(packed[:, 0] & 15, codes[:, 0])  # the even column is the low half
    assert np.array_equal(np.asarray(pack_nibbles(jnp.asarray(codes))), packed)


def test_small_floats_are_those_of_ml_dtypes():
    for module in (np, jnp):
        codes = module.asarray(BYTES)
        finite = ~np.isnan(BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
        e4m3 = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert np.array_equal(np.asarray(decode_e4m3(codes))[finite], e4m3[finite])
        assert np.asarray(decode_e2m1(module.asarray(BYTES[:16]))).tolist() == [
            *E2M1_VALUES,
            *(-value for value in E2M1_VALUES),
        ]
        e8m0 = BYTES[:255].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        # 2^-127 is not a normal float32, and XLA:CPU may take it for zero.
        assert np.array_equal(np.asarray(decode_e8m0(codes))[1:255], e8m0[1:])
    assert decode_e8m0(BYTES)[0] == 2.0**-127
