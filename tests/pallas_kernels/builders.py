"""Random weights and activations for the kernels, and how far two results are apart."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul import SumSq
from pallas_kernels.tiles import BITS_PER_QVALUE, make_tiles

# In the interpreter kernels compute in float32, only in another order than the reference.
TOLERANCE = 2e-6


def make_random_tiles(rng, shape, kind, group=0, *, factors=0, scale="bfloat16"):
    """Codes of every value, with scales that make the weights about one over the root of their inputs."""
    *stack, _, inputs = shape
    size = inputs**-0.5
    if BITS_PER_QVALUE[kind] >= 16:
        values = rng.standard_normal(shape).astype(np.float32) * size
        if kind == "bfloat16":
            return make_tiles(jnp.asarray(np.asarray(jnp.asarray(values, jnp.bfloat16)).view(np.uint16)), kind)
        return make_tiles(jnp.asarray(values.view(np.uint32)), kind)
    codes = rng.integers(0, 1 << BITS_PER_QVALUE[kind], shape).astype(np.uint8)
    if kind == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0
    unit = size / {"fp8": 100.0, "fp4": 3.0}.get(kind, 2.0 ** (BITS_PER_QVALUE[kind] - 2))
    if factors:
        spread = rng.uniform(0.5, 1.5, (*stack, factors, inputs)) * unit
        return make_tiles(jnp.asarray(codes), kind, input_scales=jnp.asarray(spread, scale))
    scales = rng.uniform(0.5, 1.5, (*shape[:-1], inputs // group if group else 1)) * unit
    offsets = rng.standard_normal(scales.shape) * size if kind.startswith("u") else None
    return make_tiles(
        jnp.asarray(codes),
        kind,
        jnp.asarray(scales, scale),
        None if offsets is None else jnp.asarray(offsets, jnp.float32),
    )


def random_normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def random_sum_sq(rng, rows, count, *, first=0, of=None):
    """Sums of squares as an earlier kernel would leave them, with others around those in question."""
    parts = rng.uniform(10, 30, (rows, count + first + 1))
    return SumSq(jnp.asarray(parts, jnp.float32), first, of or count)


def assert_close(found, expected, tolerance=TOLERANCE):
    """Relative to the largest value: these are sums, whose terms cancel."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = np.max(np.abs(found - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30)
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
