"""Models shared by the tests of the LLM object, compiled with few optimizations because they are small."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import pytest

from glm_jax.llm import LLM
from tests.builders.llm_checkpoints import write_random_model, write_scripted_model


@pytest.fixture(scope="package", autouse=True)
def quick_compile() -> Iterator[None]:
    """Halves the time to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint."""
    return write_random_model(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    """The random checkpoint in float32."""
    return LLM.load(folder, dtype="float32")


ScriptedModelFactory = Callable[[dict[str, Sequence[str]]], LLM]


@pytest.fixture
def script(tmp_path: Path) -> ScriptedModelFactory:
    """Makes a model that generates a script."""
    return lambda scripts: LLM.load(write_scripted_model(tmp_path / "scripted", scripts), dtype="float32")
