"""Properties of the memory model: it is monotonic, and its maxima are exact."""

from hypothesis import given
from hypothesis import strategies as st

from glm_jax.memory import plan_memory
from tests.memory.plans import CACHE_DTYPES, DEVICE_BYTES, DTYPES, LARGE, SPLITS, VARIANT_CONFIGS, plan_on, split_plan


def test_with_dtype_keeps_an_8_bit_cache():
    plan = plan_on("h100", dtype="float32", cache_dtype="fp8", context=4096)
    assert plan.memory_model.with_dtype("bfloat16").placement.cache_dtype == "fp8"
    assert "cache_dtype" not in plan.oom_message()


@given(SPLITS, DTYPES, CACHE_DTYPES, st.booleans(), st.data())
def test_requirement_is_monotonic(split, dtype, cache_dtype, on_cpu, data):
    cfg, devices = split
    model = split_plan(cfg, devices, device_bytes=0, dtype=dtype, cache_dtype=cache_dtype, on_cpu=on_cpu).memory_model
    lengths = st.one_of(st.integers(1, cfg.max_position_embeddings), st.integers(2040, 2060))
    short, long = sorted(data.draw(st.tuples(lengths, lengths)))
    few, many = sorted(data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300))))
    assert model.requirement(few, short).total <= model.requirement(few, long).total
    assert model.requirement(few, short).total <= model.requirement(many, short).total
    assert min(model.requirement(few, short)) >= 0


@given(SPLITS, st.integers(1, 5000), st.integers(1, 100))
def test_more_devices_never_need_more_per_device(split, context, sequences):
    cfg, devices = split
    fewer, more = (
        split_plan(cfg, n, device_bytes=LARGE, context=context, sequences=sequences, bandwidth=10**12)
        for n in (1, devices)
    )
    assert more.requirement.total <= fewer.requirement.total
    assert more.bound_tokens_per_s >= fewer.bound_tokens_per_s


@given(SPLITS, DTYPES, DEVICE_BYTES, st.integers(1, 5000), st.integers(1, 100), st.booleans())
def test_max_context_and_max_sequences_are_exact(split, dtype, device_bytes, context, sequences, mtp):
    cfg, devices = split
    plan = split_plan(
        cfg, devices, device_bytes=device_bytes, dtype=dtype, context=context, sequences=sequences, mtp=mtp
    )
    fits, max_context, max_sequences = plan.memory_model.fits, plan.max_context, plan.max_sequences
    assert 0 <= max_context <= cfg.max_position_embeddings
    assert max_context == 0 or fits(1, max_context)
    assert max_context == cfg.max_position_embeddings or not fits(1, max_context + 1)
    assert max_sequences == 0 or fits(max_sequences, context)
    assert not fits(max_sequences + 1, context)
    assert plan.fits == (sequences <= max_sequences) == (plan.requirement.total <= device_bytes)
    assert plan.fits is fits(sequences, context)


@given(VARIANT_CONFIGS, DEVICE_BYTES, st.integers(1, 20))
def test_context_defaults_to_the_longest_that_fits(cfg, device_bytes, sequences):
    plan = plan_memory(cfg, device_bytes=device_bytes, sequences=sequences)
    assert plan.context == max(1, plan.memory_model.max_context(sequences))
    assert plan.fits == (plan.memory_model.max_context(sequences) > 0)
