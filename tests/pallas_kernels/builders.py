"""Random weights and activations for the kernels, and a comparison of two results."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul import SumSq
from pallas_kernels.tiles import BITS_PER_QVALUE
from tests.pallas_kernels.references import make_tiles

# In the interpreter kernels compute in float32, in another order than the reference.
TOLERANCE = 2e-6


def make_random_tiles(rng, shape, kind, group_size=0, *, input_scale_sets=0, scale_dtype="bfloat16"):
    """A weight with qvalues of every value, and scales that give it a standard deviation near ``inputs ** -0.5``."""
    *stack, _, inputs = shape
    std = inputs**-0.5
    if BITS_PER_QVALUE[kind] >= 16:
        values = rng.standard_normal(shape).astype(np.float32) * std
        if kind == "bfloat16":
            return make_tiles(jnp.asarray(np.asarray(jnp.asarray(values, jnp.bfloat16)).view(np.uint16)), kind)
        return make_tiles(jnp.asarray(values.view(np.uint32)), kind)
    qvalues = rng.integers(0, 1 << BITS_PER_QVALUE[kind], shape).astype(np.uint8)
    if kind == "fp8":
        qvalues[(qvalues & 0x7F) == 0x7F] = 0
    unit = std / {"fp8": 100.0, "fp4": 3.0}.get(kind, 2.0 ** (BITS_PER_QVALUE[kind] - 2))
    if input_scale_sets:
        spread = rng.uniform(0.5, 1.5, (*stack, input_scale_sets, inputs)) * unit
        return make_tiles(jnp.asarray(qvalues), kind, input_scales=jnp.asarray(spread, scale_dtype))
    scales = rng.uniform(0.5, 1.5, (*shape[:-1], inputs // group_size if group_size else 1)) * unit
    offsets = rng.standard_normal(scales.shape) * std if kind.startswith("u") else None
    return make_tiles(
        jnp.asarray(qvalues),
        kind,
        jnp.asarray(scales, scale_dtype),
        None if offsets is None else jnp.asarray(offsets, jnp.float32),
    )


def random_normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def random_sum_sq(rng, rows, blocks, *, first=0):
    """Sums of squares as an earlier kernel writes them, between blocks of other columns."""
    partials = rng.uniform(10, 30, (rows, blocks + first + 1))
    return SumSq(jnp.asarray(partials, jnp.float32), first, blocks)


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Compares relative to the largest value: these are sums, whose terms cancel."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error = np.max(np.abs(actual - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30)
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
