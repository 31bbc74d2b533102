"""The loop that operations are timed in: nothing runs between its calls, and none of them is left out."""

import pytest

from pallas_kernels import aot
from tests.aot.timing_programs import CALLS

pytestmark = pytest.mark.aot


def test_a_round_is_its_calls_and_little_else():
    made = aot.run_in_child("tests.aot.timing_programs:launches", {"gpu": "h200"})
    assert {name.split("/")[0] for name in made} >= {"linear", "queries", "attend", "values", "gate_up", "down"}
    for name, found in made.items():
        kernels = dict(found["kernels"])
        (mine,) = [kernel for kernel in kernels if kernel.endswith("_kernel")]
        assert kernels.pop(mine) == CALLS, name
        # What tells the calls of flash apart; whether a token is one is part of the head.
        more = {"flash": "loop_minimum_fusion", "head": "loop_compare_fusion"}.get(name.split("/")[0], "")
        assert kernels.pop(more, 0) <= CALLS
        assert sum(kernels.values()) <= 4, (name, kernels)  # the counter, activations, parts of them
        assert not [kernel for kernel in kernels if "opy" in kernel], (name, kernels)
        assert (found["graphs"], found["outside"]) == (1, 0), name
