"""Tests for a card. In Triton's interpreter they run too, at small widths and in float32: that tests the tests.

``make gpu`` runs them where there is a GPU, and `make test-kernels` in the interpreter.
"""

import jax
import pytest

from pallas_kernels import interpreted
from pallas_kernels.specs import Sweep, Widths

# What only a card can show: addresses, launches, more shared memory than a program has without asking.
collect_ignore = ["test_card.py"] if interpreted() else []

SMALL = Widths(
    hidden=128, heads=3, nope=32, rope=32, value=32, latent=128, query_latent=64, experts=6, chosen=3, expert_width=64,
    dense_width=96, vocab=130,
)  # fmt: skip
if interpreted():
    SWEEPS = [
        Sweep(
            widths=SMALL, rows=(3,), kinds=("int4",), contexts=(48,), chunks=(21,), caches=("fp8",), group=32,
            dtype="float32",
        )
    ]  # fmt: skip
else:
    SWEEPS = [
        Sweep(rows=(1,), contexts=(1000, 8192), chunks=(70, 1000)),
        Sweep(rows=(17,), kinds=("int4",), contexts=(1000,), chunks=(), caches=("int8",)),
        Sweep(rows=(33,), kinds=("int8",), contexts=(1000,), chunks=(), caches=("bfloat16",)),
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not interpreted() and jax.default_backend() != "gpu":
        pytest.fail("these tests need a GPU (make gpu), or TRITON_INTERPRET=1 (make test-kernels)", pytrace=False)
