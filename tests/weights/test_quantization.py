"""Quantizing weights: error bounds, the scale search, exact cases."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.errors import QuantError
from glm_jax.weights import QuantSpec, dequantize, quantize
from glm_jax.weights.codes import expand_planes
from glm_jax.weights.quantized_tensor import decode_scales
from tests.builders.quantized_tensors import E2M1_VALUES

MAKEABLE = (
    QuantSpec(kind="int4", block=(1, 8)),
    QuantSpec(kind="int4", block=(1, 8), zero="point", scale="float16"),
    QuantSpec(kind="int8", block=(1, 0)),
    QuantSpec(kind="int8", block=(1, 16), zero="point", scale="float32"),
    QuantSpec(kind="fp8", block=(4, 8), scale="float32"),
    QuantSpec(kind="fp4", block=(1, 16), scale="e8m0"),
)


def weight(seed=0, shape=(3, 8, 32)):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1)))).astype(np.float32)


def steps(tensor):
    """The scale of every value."""
    (scales, *_) = expand_planes(decode_scales(tensor), tensor.spec, tensor.shape)
    scales = np.broadcast_to(np.asarray(scales), (*tensor.shape[:-2], *scales.shape[-2:]))
    return np.repeat(scales, tensor.shape[-1] // scales.shape[-1], axis=-1)


def test_rtn_errs_by_half_a_step_at_most():
    for spec in MAKEABLE[:4]:
        w = weight()
        made = quantize(jnp.asarray(w), spec, "rtn")
        # The stored scale is rounded too: an end of the range may be off by that share of it.
        slack = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-22}[spec.scale]
        range_steps = 2.0**spec.bits
        assert (np.abs(np.asarray(dequantize(made)) - w) <= steps(made) * (0.5 + slack * range_steps)).all(), spec


@pytest.mark.parametrize("spec", MAKEABLE, ids=lambda spec: spec.name.replace(" ", "-"))
def test_the_search_never_does_worse_in_any_block(spec):
    w = weight(1)
    errors = []
    for method in ("rtn", "mse"):
        made = quantize(jnp.asarray(w), spec, method)
        square = (np.asarray(dequantize(made)) - w) ** 2
        rows, columns = spec.block[0] or 8, spec.block[1] or 32
        errors.append(square.reshape(3, 8 // rows, rows, 32 // columns, columns).sum(axis=(2, 4)))
    # The search compares sums of up to 256 squares in float32.
    assert (errors[1] <= errors[0] * (1 + 256 * 2.0**-24)).all()
    if spec.bits == 4:  # with 8 bits the full range is often the best there is
        assert errors[1].sum() < 0.99 * errors[0].sum()


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(MAKEABLE), st.sampled_from([1e-30, 1.0, 1e30]))
def test_whatever_the_size_of_the_weights(seed, spec, size):
    w = weight(seed, (8, 32)) * np.float32(size)
    made = quantize(jnp.asarray(w), spec)
    scales = np.asarray(decode_scales(made))
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    values = np.asarray(dequantize(made))
    assert np.isfinite(values).all()
    if spec.scale != "float16":  # whose own range is shorter
        assert np.abs(values - w).max() <= np.abs(w).max()


@pytest.mark.parametrize("spec", MAKEABLE, ids=lambda spec: spec.name.replace(" ", "-"))
def test_zeros_stay_zeros(spec):
    assert not np.asarray(dequantize(quantize(jnp.zeros((8, 32)), spec))).any()


def test_values_on_the_grid_are_kept():
    codes = np.random.default_rng(0).integers(-7, 8, (8, 32)).astype(np.float32)
    codes[:, ::8] = 7.5  # the end of each group's range, so that the scale is exactly one
    made = np.asarray(dequantize(quantize(jnp.asarray(codes), MAKEABLE[0], "rtn")))
    inside = codes != 7.5
    assert np.array_equal(made[inside], codes[inside])


def test_small_floats_round_to_the_nearest():
    w = weight(3, (8, 32))
    for spec, grid in (
        (QuantSpec(kind="fp4", block=(1, 16), scale="e8m0"), np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])),
        (QuantSpec(kind="fp8", block=(1, 0), scale="float32"), _e4m3_grid()),
    ):
        made = quantize(jnp.asarray(w), spec, "rtn")
        scaled = w / steps(made)
        nearest = np.abs(scaled[..., None] - grid).min(axis=-1)
        chosen = np.abs(np.asarray(dequantize(made)) / steps(made) - scaled)
        assert np.allclose(chosen, nearest, atol=1e-5 * np.abs(grid).max())


def _e4m3_grid():
    import ml_dtypes

    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return every[np.isfinite(every)]


def test_matrices_of_a_stack_do_not_touch_each_other():
    w = weight(4)
    whole = quantize(jnp.asarray(w), MAKEABLE[0])
    alone = quantize(jnp.asarray(w[1:2]), MAKEABLE[0])
    assert all(np.array_equal(a[1:2], alone.components()[name]) for name, a in whole.components().items())


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        (QuantSpec(kind="int4", block=(1, 24)), (8, 32), "blocks of 24 inputs do not divide the 32"),
        (QuantSpec(kind="fp8", block=(3, 8)), (8, 32), "blocks of 3 outputs do not divide the 8"),
        (QuantSpec(kind="int4", block=(1, 8), zero="bias"), (8, 32), "can be read but are not made here"),
        (QuantSpec(kind="fp4", block=(1, 16), scale="e4m3", outer="divide"), (8, 32), "not made here"),
        (QuantSpec(kind="int4", block=(1, 8), permuted=True), (8, 32), "not made here"),
        (QuantSpec(kind="int4", block=(1, 3)), (8, 33), "packs 2 inputs to a byte"),
    ],
)
def test_what_cannot_be_made_is_refused(spec, shape, words):
    with pytest.raises(QuantError, match=words):
        quantize(jnp.zeros(shape), spec)


def test_an_unknown_method_is_refused():
    with pytest.raises(QuantError, match="no method 'best'; there are rtn, mse"):
        quantize(jnp.zeros((8, 32)), MAKEABLE[0], "best")  # pyright: ignore[reportArgumentType]
