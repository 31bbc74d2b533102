"""The message of a plan that does not fit: its arithmetic, and that every alternative in it is true."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.errors import MemoryPlanError
from glm_jax.memory import known_gpus, plan_memory
from tests.memory.plans import DEVICE_BYTES, DTYPES, FLASH, SPLITS, plan_on, split_plan


@settings(max_examples=40)
@given(SPLITS, DTYPES, DEVICE_BYTES, st.integers(1, 5000), st.integers(1, 100))
def test_require_fits_raises_exactly_when_the_sum_is_too_large(split, dtype, device_bytes, context, sequences):
    cfg, devices = split
    plan = split_plan(cfg, devices, device_bytes=device_bytes, dtype=dtype, context=context, sequences=sequences)
    if plan.fits:
        assert plan.require_fits() is plan
        return
    with pytest.raises(MemoryPlanError) as caught:
        plan.require_fits()
    assert str(caught.value) == plan.oom_message()
    assert sum(plan.requirement) == plan.requirement.total > device_bytes


def test_message_shows_the_arithmetic_and_alternatives_that_fit():
    plan = plan_on("rtx6000-adax2", context=32_768, sequences=16)
    assert plan.oom_message().splitlines() == [
        "30.73 GB weights + 28.39 GB cache (16 sequences of 32,768 tokens at 54,144 bytes) + 2.08 GB workspace "
        "= 61.21 GB, but each of the 2 devices has 48.95 GB",
        "what would fit: 9 sequences of that length",
        "what would fit: a context of 18,916 tokens for each sequence",
        'what would fit: weights in fewer bits, with quantize="int8"',
        'what would fit: 8 bits per cached value, with cache_dtype="int8" or "fp8"',
        "what would fit: 4 such devices, with mesh=4",
    ]
    # Each alternative fits, and one more sequence or token does not.
    assert plan_on("rtx6000-adax2", context=32_768, sequences=9).fits
    assert not plan_on("rtx6000-adax2", context=32_768, sequences=10).fits
    assert plan_on("rtx6000-adax2", context=18_916, sequences=16).fits
    assert not plan_on("rtx6000-adax2", context=18_917, sequences=16).fits
    for kind in ("int8", "fp8"):
        assert plan_on("rtx6000-adax2", context=32_768, sequences=16, cache_dtype=kind).fits
    assert plan.memory_model.with_quantization("int8").fits(16, 32_768)
    assert plan_on("rtx6000-adax4", context=32_768, sequences=16).fits


def test_message_about_the_weights_alone_offers_quantization_or_more_devices():
    lines = plan_on("rtx4090", context=100).oom_message().splitlines()
    assert lines[1:] == [
        'what would fit: weights in fewer bits, with quantize="int4"',
        "what would fit: 4 such devices, with mesh=4",
    ]
    plan = plan_on("rtx4090")
    assert (plan.fits, plan.context, plan.max_context, plan.max_sequences) == (False, 1, 0, 0)
    assert "1 sequence of 1 token at" in plan.oom_message()


def test_message_offers_bfloat16():
    plan = plan_on("h100", dtype="float32", context=4096)
    assert 'what would fit: half the bytes per value, with dtype="bfloat16"' in plan.oom_message().splitlines()
    assert plan_on("h100", dtype="bfloat16", context=4096).fits


def test_message_does_not_offer_more_cpu_devices():
    assert "devices" not in plan_memory(FLASH, device_bytes=10**10, on_cpu=True).oom_message()


def test_message_about_the_default_memory_fraction_has_a_line_for_the_notebook():
    size = known_gpus()["h100"].memory_bytes
    options = {"context": 100_000, "default_memory_fraction": True}
    lines = plan_memory(FLASH, device_bytes=int(0.75 * size), **options).oom_message().splitlines()
    assert lines[-1] == 'import os; os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"'
    assert "75% of a GPU" in lines[-2]
    assert plan_memory(FLASH, device_bytes=int(0.95 * size), context=100_000).fits
    # The line is missing where it would not help, and where the fraction was chosen.
    small = int(0.75 * known_gpus()["l40s"].memory_bytes)
    assert "import os" not in plan_memory(FLASH, device_bytes=small, **options).oom_message()
    assert "import os" not in plan_memory(FLASH, device_bytes=int(0.75 * size), context=100_000).oom_message()
