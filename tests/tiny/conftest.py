"""A training run small enough to repeat: a small model, the miniature's tokenizer, short rows."""

import dataclasses
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer

import glm_jax
from examples.tiny_recipe.schedule import BatchShape, Stage, TrainingSchedule, tiny_config
from tests.builders.tiny_overrides import TINY_OVERRIDES

CODE_TEXTS = ["def area(w, h):\n    return w * h\n" * 40, "import os\n\nprint(os.getcwd())\n" * 60]


@pytest.fixture(scope="session")
def small_config():
    return tiny_config().replace(**TINY_OVERRIDES)


@pytest.fixture(scope="session")
def small_plan():
    """Two compiled steps: short rows without the prediction layer, then longer rows with it."""
    short = Stage(start=0, code=BatchShape(2, 32), chat=BatchShape(1, 96), mtp=False)
    long = Stage(start=4, code=BatchShape(1, 64), chat=BatchShape(1, 96))
    hard = dataclasses.replace(long, start=12, tool_share=0.5, hard_share=0.5)
    return TrainingSchedule(steps=20, decay_steps=6, warmup_steps=2, stages=(short, long, hard))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    return Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny_folder():
    return Path(glm_jax.__file__).parent / "tiny"


@pytest.fixture
def lenient():
    """Allows mixed scalar dtypes, which optax's Muon uses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
