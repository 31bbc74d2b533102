"""Every operation on a GPU, at the real model's widths: the results of the reference, and the same every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import is_interpreted
from pallas_kernels.specs import SPEC_BUILDERS, list_specs, relative_errors
from tests.gpu.conftest import SWEEPS

pytestmark = pytest.mark.gpu
SPECS = [spec for sweep in SWEEPS for spec in list_specs(sweep)]
INTERPRETER_TOLERANCE = 5e-6  # float32 sums in another order


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.full_name)
def test_an_operation_gives_the_results_of_its_reference_every_time(spec):
    layer_index = jnp.ones(1, jnp.int32)
    inputs, state = jax.jit(spec.make_inputs, static_argnums=0)(2)

    @jax.jit
    def run(inputs, state, layer_index):
        return spec.comparable_outputs(
            inputs, *spec.run(inputs, state, layer_index, implementation="triton"), layer_index
        )

    first, second = (run(inputs, state, layer_index) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    expected = spec.comparable_outputs(inputs, *spec.reference(inputs, state, layer_index), layer_index)
    assert [x.dtype for x in first] == [x.dtype for x in expected]
    errors = relative_errors(first, expected)
    limits = [INTERPRETER_TOLERANCE if is_interpreted() else spec.tolerance(x.dtype) for x in first]
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True)), (errors, limits)


def test_every_operation_has_a_specification():
    assert {spec.op for spec in SPECS} == set(SPEC_BUILDERS)
