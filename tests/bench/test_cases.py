"""Cases of a benchmark that are skipped or fail, and the tokens that are compared."""

import jax
import pytest

from glm_jax.bench import cases
from glm_jax.bench.glm_jax_backend import GlmJaxBackend
from glm_jax.bench.options import DecodeOptions
from glm_jax.bench.run import validate_bench_options
from pallas_kernels import LaunchError


def run_cases(**changes):
    """Returns the results of the cases of the built-in miniature."""
    options = DecodeOptions(repeats=1, tokens=2, **changes)
    validate_bench_options(options)
    return list(cases.run_cases(options, GlmJaxBackend("tiny", "float32"), [], 1e9))


def test_case_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(cases, "available_device_memory", lambda device: 40_000_000)
    first, second = run_cases(batch="1,64", context="256")
    assert "glm_jax" in first
    assert second["skipped"].endswith("for cache and workspace, and 40.00 MB are free")
    assert second["skipped"].startswith("needs ")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore"), "skipped"),
        (LaunchError("no kernel"), "failed"),
        (jax.errors.JaxRuntimeError("INTERNAL: broken"), "failed"),
    ],
)
def test_failing_case_does_not_stop_the_others(monkeypatch, error, outcome):
    original = GlmJaxBackend.decode

    def decode(self, state, tokens):
        if state.cache.batch == 2:
            raise error
        return original(self, state, tokens)

    monkeypatch.setattr(GlmJaxBackend, "decode", decode)
    results = run_cases(batch="1,2,4", context="8")
    assert ["glm_jax" in result for result in results] == [True, False, True]
    assert results[1][outcome] == str(error).splitlines()[0]


def test_tokens_are_compared_only_between_equal_weights():
    comparison = {"same_tokens": {"unquantized": 0.1, "reference": 1.0}}
    assert cases._drop_incomparable_tokens(DecodeOptions(model="tiny"), comparison) == comparison
    synthetic = DecodeOptions(model="synthetic:flash")
    assert cases._drop_incomparable_tokens(synthetic, {}) == {}
    assert cases._drop_incomparable_tokens(synthetic, comparison) == {"same_tokens": {"reference": 1.0}}
