"""The loop that operations are timed in: nothing runs between its calls, and none of them is skipped."""

import pytest

from pallas_kernels import aot
from tests.aot.timing_programs import CALLS

pytestmark = pytest.mark.aot


def test_a_round_is_its_calls_and_little_else():
    launches = aot.run_in_child("tests.aot.timing_programs:count_launches", {"gpu": "h200"})
    assert {name.split("/")[0] for name in launches} >= {"linear", "queries", "attend", "values", "gate_up", "down"}
    for name, counts in launches.items():
        kernels = dict(counts["kernels"])
        (own,) = [kernel for kernel in kernels if kernel.endswith("_kernel")]
        assert kernels.pop(own) == CALLS, name
        # The first key, which differs between calls of flash; the conversion of the head's flag.
        fusion = {"flash": "loop_minimum_fusion", "head": "loop_compare_fusion"}.get(name.split("/")[0], "")
        assert kernels.pop(fusion, 0) <= CALLS
        assert sum(kernels.values()) <= 4, (name, kernels)  # the counter and the activations
        assert not [kernel for kernel in kernels if "opy" in kernel], (name, kernels)
        assert (counts["graphs"], counts["outside"]) == (1, 0), name
