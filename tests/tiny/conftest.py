"""A training run small enough to repeat: a model of two layers, a tokenizer learnt from a page, short rows."""

import jax
import pytest

from examples.tiny_recipe.plan import Plan, Rows, tiny_config

CODE = ["def area(w, h):\n    return w * h\n" * 40, "import os\n\nprint(os.getcwd())\n" * 60]


@pytest.fixture(scope="session")
def small_config():
    return tiny_config().replace(
        hidden_size=32,
        num_hidden_layers=2,
        mlp_layer_types=("dense", "sparse"),
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=16,
    )


@pytest.fixture(scope="session")
def small_plan():
    rows = {"short": Rows(2, 32), "long": Rows(1, 64), "chat": Rows(1, 96)}
    return Plan(steps=6, decay_steps=2, warmup_steps=2, mtp_from=2, long_from=4, **rows)


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
