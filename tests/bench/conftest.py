"""Makes the benchmark quick enough for tests."""

import pytest


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_jax.bench.timing._PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("glm_jax.bench.hardware._READ_BYTES", 1 << 20)
