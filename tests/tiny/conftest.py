"""A training run small enough to repeat: a model of two layers, a tokenizer learnt from a page, short rows."""

import dataclasses

import jax
import pytest

from examples.tiny_recipe.schedule import Plan, Rows, Stage, tiny_config
from tests.builders.tiny_overrides import SMALLER

CODE = ["def area(w, h):\n    return w * h\n" * 40, "import os\n\nprint(os.getcwd())\n" * 60]


@pytest.fixture(scope="session")
def small_config():
    return tiny_config().replace(**SMALLER)


@pytest.fixture(scope="session")
def small_plan():
    """Two compilations: short rows without the prediction layer, then longer ones with it."""
    short = Stage(start=0, code=Rows(2, 32), chat=Rows(1, 96), mtp=False)
    long = Stage(start=4, code=Rows(1, 64), chat=Rows(1, 96))
    hard = dataclasses.replace(long, start=12, tool_share=0.5, hard_share=0.5)
    return Plan(steps=20, decay_steps=6, warmup_steps=2, stages=(short, long, hard))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny_folder():
    from pathlib import Path

    import glm_jax

    return Path(glm_jax.__file__).parent / "tiny"


@pytest.fixture
def lenient():
    """optax's Muon mixes dtypes of scalars."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
