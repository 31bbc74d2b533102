"""The loader against a mapping by hand, on folders with a prediction layer of either kind and with none."""

from pathlib import Path

import numpy as np
import pytest

from glm_jax.checkpoint import load
from glm_jax.weights.params import leaves_with_path
from tests.builders.hf_checkpoints import to_params, write_checkpoint
from tests.builders.small_models import MODEL_VARIANTS, OWN_MTP_MODEL, SmallModel

FOLDERS = {**MODEL_VARIANTS, "own_mtp": OWN_MTP_MODEL}


@pytest.mark.parametrize("small", FOLDERS.values(), ids=FOLDERS)
def test_config_and_every_array(small: SmallModel, tmp_path: Path) -> None:
    cfg, params, _ = load(write_checkpoint(tmp_path, small.config, small.tensors, shards=3), dtype="float32")
    assert cfg == small.cfg
    loaded, expected = dict(leaves_with_path(params)), dict(leaves_with_path(to_params(small.tensors, cfg)))
    assert loaded.keys() == expected.keys()
    for path, array in expected.items():
        assert loaded[path].dtype == array.dtype
        assert np.array_equal(loaded[path], array), path


def test_without_the_prediction_layer(tmp_path: Path) -> None:
    small = MODEL_VARIANTS["odd"]
    cfg, params, _ = load(write_checkpoint(tmp_path, small.config, small.tensors), dtype="float32", mtp=False)
    assert cfg == small.cfg.replace(num_nextn_predict_layers=0)
    assert "mtp" not in params


def test_a_config_that_promises_a_layer_which_the_files_lack(tmp_path: Path) -> None:
    """transformers drops the prediction layer when it saves and leaves its count in config.json."""
    small = MODEL_VARIANTS["odd"]
    kept = {name: value for name, value in small.tensors.items() if not name.startswith("model.layers.3.")}
    cfg, params, _ = load(write_checkpoint(tmp_path, small.config, kept), dtype="float32")
    assert cfg == small.cfg.replace(num_nextn_predict_layers=0)
    assert "mtp" not in params
