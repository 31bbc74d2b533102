"""What every test runs under: eight fake CPU devices, strict JAX, warnings as errors (the last in pyproject.toml)."""

import contextlib
import importlib.util
import os
import re
import tempfile
from pathlib import Path

GPU_REQUESTED = os.environ.get("GLM_JAX_TEST_GPU") == "1"


def _prepare_environment() -> None:
    """Runs before JAX is imported, and is inherited by the commands that tests start."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    if not GPU_REQUESTED:
        os.environ["JAX_PLATFORMS"] = "cpu"
    # Nothing is downloaded, and nothing is left in the home folder of whoever runs the tests.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parents[1] / ".cache")


_prepare_environment()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, because a first example compiles. `make test` repeats exactly; `make soak` looks further each time.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile("repeatable")

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
# These import torch at the top; where it is not installed they cannot even be collected.
collect_ignore_glob = [] if HAS_TORCH else ["parity/*", "test_parity*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if re.search(r"(?<!not )\bparity\b", config.option.markexpr) and not HAS_TORCH:
        raise pytest.UsageError("parity tests need torch and transformers: run `make test-parity`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/parity is a parity test, so that no file can forget the marker."""
    for item in items:
        if item.nodeid.startswith("tests/parity/") or item.path.name.startswith("test_parity"):
            item.add_marker(pytest.mark.parity)


@pytest.fixture
def debug_nans():
    """Fails the test at the operation that makes a NaN. Opt-in: JAX turns buffer donation off while it checks."""
    with jax.debug_nans(True):
        yield


@pytest.fixture
def bound():
    """A folder, and a context in which permissions bind: the superuser, who may write anywhere, becomes its owner."""
    is_root, nobody = os.geteuid() == 0, 65534

    @contextlib.contextmanager
    def by_permissions():
        if is_root:
            for path in (place, *place.rglob("*")):
                os.chown(path, nobody, nobody)
            os.seteuid(nobody)
        try:
            yield
        finally:
            if is_root:
                os.seteuid(0)

    with tempfile.TemporaryDirectory() as name:  # tmp_path lies where only the user who started the tests may look
        place = Path(name)
        yield place, by_permissions
