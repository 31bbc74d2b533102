"""Settings of every test: eight fake CPU devices, strict JAX, and compiled programs kept between runs.

Warnings are errors; that setting is in pyproject.toml.
"""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
GPU_REQUESTED = os.environ.get("GLM_JAX_TEST_GPU") == "1"


def _prepare_environment() -> None:
    """Sets what JAX reads when it is imported, for this process and for the commands that tests start."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    if not GPU_REQUESTED:
        os.environ["JAX_PLATFORMS"] = "cpu"
    # Nothing is downloaded, and nothing is left in the home folder of whoever runs the tests.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    # Containers often forbid bytecode files; then each of a hundred processes would parse all sources again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


_prepare_environment()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Half of the time goes into compiling, so programs are kept for later runs, in the folder of `enable_compile_cache`.
# A maximal size turns on the locks that several processes need.
jax.config.update("jax_compilation_cache_max_size", 4 << 30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "glm_jax" / "compiled"))

# No deadline, because a first example compiles. `make test` repeats its examples; `make soak` tries new ones each time.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile("repeatable")

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
# These files import torch at the top, so they cannot even be collected without it.
collect_ignore_glob = [] if HAS_TORCH else ["parity/*", "test_parity*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if re.search(r"(?<!not )\bparity\b", config.option.markexpr) and not HAS_TORCH:
        raise pytest.UsageError("parity tests need torch and transformers: run `make test-parity`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything under tests/parity as a parity test, so that no file can forget the marker."""
    for item in items:
        if item.nodeid.startswith("tests/parity/") or item.path.name.startswith("test_parity"):
            item.add_marker(pytest.mark.parity)


@pytest.fixture
def debug_nans():
    """Fails a test at the operation that produces a NaN. It is optional because JAX then donates no buffers."""
    with jax.debug_nans(True):
        yield


@pytest.fixture
def restricted_folder():
    """A folder, and a context in which permissions apply: the superuser, who may write anywhere, becomes its owner."""
    is_root, nobody = os.geteuid() == 0, 65534

    @contextlib.contextmanager
    def with_permissions():
        if is_root:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, nobody, nobody)
            os.seteuid(nobody)
        try:
            yield
        finally:
            if is_root:
                os.seteuid(0)

    with tempfile.TemporaryDirectory() as name:  # only the user who started the tests can enter tmp_path
        folder = Path(name)
        yield folder, with_permissions
