"""Matrices with one more scale for the whole, in every place that a matrix can be."""

import numpy as np
import pytest

from convert.pipeline import convert
from glm_jax import checkpoint
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.params import leaves
from tests.builders import hf_checkpoints as checkpoints
from tests.builders import hf_configs as spellings
from tests.builders.quantized_tensors import random_tensor
from tests.builders.small_models import Small

CONFIG = spellings.odd(hidden_size=48, num_hidden_layers=2)
SMALL = Small(CONFIG, own_mtp=True)
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
    params = checkpoints.to_device(SMALL.params)
    node = params
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = random_tensor(SPEC, node[path[-1]].shape)
    checkpoint.save(tmp_path / "once", SMALL.cfg, params)
    convert(tmp_path / "once", tmp_path / "twice")
    _, again, _ = checkpoint.load(tmp_path / "twice", dtype="float32", check=True)
    for name, leaf in leaves(again):
        expected = dict(leaves(params))[name]
        assert isinstance(leaf, QuantizedTensor) == (name == path)
        assert np.array_equal(np.asarray(leaf), np.asarray(expected)), name
