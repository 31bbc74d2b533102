"""bfloat16 checkpoints and bfloat16 arithmetic.

Loaded as float32, a bfloat16 checkpoint must give transformers' float32 logits. Computed in bfloat16, random models
select other experts, so the routing is forced to be equal, and our distance from the exact result is compared with
transformers' own.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from glm_jax.checkpoint import load
from glm_jax.model import GLM
from glm_jax.weights.params import leaves_with_path
from tests.builders.hf_checkpoints import read_tensors, to_params
from tests.builders.jitted_model import JittedModel, is_close, random_tokens
from tests.parity import hf_models
from tests.parity.cases import CASES, ParityCase
from tests.reference import ReferenceModel

# torch multiplies grouped bfloat16 matrices only when their rows are multiples of 16 bytes.
CHOSEN = [
    replace(case, changes={**case.changes, "moe_intermediate_size": 16})
    for case in CASES
    if case.name in ("original", "all_at_once", "flash_like")
]


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda case: case.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ParityCase, Path]:
    """A checkpoint with every tensor in bfloat16, the router bias included."""
    folder = tmp_path_factory.mktemp("bfloat16")
    hf_models.build_random_model(request.param).bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(request.param.config))
    return request.param, folder


def test_loading_keeps_every_bit(saved: tuple[ParityCase, Path]) -> None:
    _, folder = saved
    cfg, params, _ = load(folder, dtype="bfloat16")
    expected = dict(leaves_with_path(to_params(read_tensors(folder), cfg, np.float32)))
    for path, leaf in leaves_with_path(params):
        assert str(leaf.dtype) == ("float32" if path[-1] == "router_bias" else "bfloat16"), path
        assert np.array_equal(np.asarray(leaf).astype(np.float32), expected[path]), path


def test_float32_logits_of_a_bfloat16_checkpoint(saved: tuple[ParityCase, Path]) -> None:
    case, folder = saved
    cfg, params, _ = load(folder, dtype="float32")
    ids = random_tokens(case.config, 1, 20)
    expected = hf_models.compute_logits(hf_models.load_model(folder), ids)
    assert is_close(JittedModel(cfg, params).apply(ids)[0], expected)


def test_bfloat16_is_as_exact_as_transformers(saved: tuple[ParityCase, Path]) -> None:
    case, folder = saved
    ids = random_tokens(case.config, 4, 24, seed=7)
    reference, routing = ReferenceModel(read_tensors(folder), case.config), {}
    exact = np.stack([reference.logits(row, record=routing.setdefault(i, {})) for i, row in enumerate(ids)])
    names = [name for name in routing[0] if name.endswith("moe.router")]
    forced = {name: np.stack([routing[i][name] for i in range(len(ids))]).astype(np.float32) for name in names}
    model = hf_models.load_model(folder, torch.bfloat16)
    hf_models.force_routing(model, {int(name.split(".")[1]): weights for name, weights in forced.items()})
    their_error = np.abs(hf_models.compute_logits(model, ids) - exact)
    our_error = np.abs(bfloat16_logits(folder, ids, forced) - exact)
    assert our_error.mean() <= 1.15 * their_error.mean()
    assert np.quantile(our_error, 0.99) <= 1.3 * np.quantile(their_error, 0.99)
    assert their_error.mean() > 1e-3  # both really computed in bfloat16


def bfloat16_logits(folder: Path, ids: Any, forced: dict[str, Any]) -> Any:
    cfg, params, _ = load(folder, dtype="bfloat16")
    edit = {name: lambda _, weights=weights: jnp.asarray(weights) for name, weights in forced.items()}
    return np.asarray(jax.jit(lambda p, t: GLM(cfg).apply({"params": p}, t, edit=edit)[0])(params, jnp.asarray(ids)))
