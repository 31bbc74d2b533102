"""Transforms lose nothing: joining the split parameters restores the tensor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.checkpoint.mapping.transforms import IDENTITY, MERGED_HEADS, Transform

_N = st.integers(1, 6)


@given(_N, _N, _N, _N, st.booleans())
def test_join_undoes_split(first, left, right, last, merged):
    param_shapes = [(first, left, last), (first, right, last)]
    transform = Transform(merges_heads=merged)
    shape = transform.tensor_shape(param_shapes)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    pieces = transform.split(tensor, param_shapes)
    assert [piece.shape for piece in pieces] == param_shapes
    assert all(np.shares_memory(piece, tensor) for piece in pieces)
    assert np.array_equal(transform.join(pieces), tensor)


def test_heads_are_split_as_the_formula_says():
    """In kv_b, viewed as ``[N, Hn+Hv, R]``, the first Hn rows of each head are keys and the others are values."""
    heads, nope, value, rank = 5, 6, 9, 14
    tensor = np.random.default_rng(0).standard_normal((heads * (nope + value), rank))
    k_b, v_b = MERGED_HEADS.split(tensor, [(heads, nope, rank), (heads, value, rank)])
    for head in range(heads):
        rows = tensor[head * (nope + value) : (head + 1) * (nope + value)]
        assert np.array_equal(k_b[head], rows[:nope])
        assert np.array_equal(v_b[head], rows[nope:])


@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 4)])
def test_whole_tensors_pass_through(shape):
    tensor = np.zeros(shape)
    assert IDENTITY.tensor_shape([shape]) == shape
    assert IDENTITY.split(tensor, [shape])[0] is tensor
    assert IDENTITY.join([tensor]) is tensor
