"""Every operation on a card, at the real model's widths: what the reference says, and the same every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import is_interpreted
from pallas_kernels.specs import SPEC_BUILDERS, list_specs, relative_errors
from tests.gpu.conftest import SWEEPS

pytestmark = pytest.mark.gpu
CASES = [case for sweep in SWEEPS for case in list_specs(sweep)]
ORDER = 5e-6  # float32 in the interpreter, whose sums are in another order


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.full_name)
def test_an_operation_is_what_its_reference_says_and_the_same_every_time(case):
    place = jnp.ones(1, jnp.int32)
    given, state = jax.jit(case.make, static_argnums=0)(2)
    run = jax.jit(lambda g, s, p: case.view(g, *case.run(g, s, p, None), p))
    first, second = (run(given, state, place) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    expected = case.view(given, *case.reference(given, state, place), place)
    assert [x.dtype for x in first] == [x.dtype for x in expected]
    errors = relative_errors(first, expected)
    allowed = [ORDER if is_interpreted() else case.tolerance(x.dtype) for x in first]
    assert all(error <= most for error, most in zip(errors, allowed, strict=True)), (errors, allowed)


def test_every_operation_has_cases():
    assert {case.op for case in CASES} == set(SPEC_BUILDERS)
