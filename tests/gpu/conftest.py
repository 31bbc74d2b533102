"""Tests for a GPU. They also run in Triton's interpreter, at small widths and in float32, which tests the tests.

``make gpu`` runs them on a GPU, and ``make test-kernels`` in the interpreter.
"""

import jax
import pytest

from pallas_kernels import is_interpreted
from pallas_kernels.specs import ModelDims, Sweep

# Only a GPU shows addresses, launches and the opt-in to more shared memory.
collect_ignore = ["test_card.py"] if is_interpreted() else []

SMALL_DIMS = ModelDims(
    hidden=128, heads=3, nope=32, rope=32, value=32, latent=128, query_latent=64, experts=6, experts_per_token=3,
    expert_width=64, dense_width=96, vocab=130,
)  # fmt: skip
if is_interpreted():
    SWEEPS = [
        Sweep(
            dims=SMALL_DIMS, batch_sizes=(3,), weight_kinds=("int4",), context_lengths=(48,), prefill_lengths=(21,),
            cache_kinds=("fp8",), group_size=32, dtype="float32",
        )
    ]  # fmt: skip
else:
    SWEEPS = [
        Sweep(batch_sizes=(1,), context_lengths=(1000, 8192), prefill_lengths=(70, 1000)),
        Sweep(
            batch_sizes=(17,),
            weight_kinds=("int4",),
            context_lengths=(1000,),
            prefill_lengths=(),
            cache_kinds=("int8",),
        ),
        Sweep(
            batch_sizes=(33,),
            weight_kinds=("int8",),
            context_lengths=(1000,),
            prefill_lengths=(),
            cache_kinds=("bfloat16",),
        ),
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not is_interpreted() and jax.default_backend() != "gpu":
        pytest.fail("these tests need a GPU (make gpu), or TRITON_INTERPRET=1 (make test-kernels)", pytrace=False)
