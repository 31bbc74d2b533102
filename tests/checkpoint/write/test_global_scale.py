"""Matrices with one more scale for the whole, in every place that a matrix can be."""

import numpy as np
import pytest

from convert.pipeline import convert_checkpoint
from glm_jax import checkpoint
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.params import leaves_with_path
from tests.builders import hf_checkpoints, hf_configs
from tests.builders.quantized_tensors import random_quantized_tensor
from tests.builders.small_models import SmallModel

CONFIG = hf_configs.odd_size_config(hidden_size=48, num_hidden_layers=2)
SMALL = SmallModel(CONFIG, own_mtp=True)
SPEC = QuantSpec(kind="fp4", block=(1, 4), scale="e4m3", outer="multiply")
PLACES = [
    ("embed",),
    ("head",),
    ("mtp", "eh_proj"),
    ("mtp", "head"),
    ("runs", "1", "attn", "q_a"),
    ("runs", "1", "moe", "gate"),
]


@pytest.mark.parametrize("path", PLACES, ids="/".join)
def test_save_and_load(path, tmp_path):
    params = hf_checkpoints.to_device(SMALL.params)
    node = params
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = random_quantized_tensor(SPEC, node[path[-1]].shape)
    checkpoint.save(tmp_path / "once", SMALL.cfg, params)
    convert_checkpoint(tmp_path / "once", tmp_path / "twice")
    _, again, _ = checkpoint.load(tmp_path / "twice", dtype="float32", check=True)
    for name, leaf in leaves_with_path(again):
        expected = dict(leaves_with_path(params))[name]
        assert isinstance(leaf, QuantizedTensor) == (name == path)
        assert np.array_equal(np.asarray(leaf), np.asarray(expected)), name
