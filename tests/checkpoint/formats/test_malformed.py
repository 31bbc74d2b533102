"""Damaged and contradictory checkpoints give one CheckpointError, or weights that are consistent."""

import json

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, dequantize
from tests.checkpoint.formats import golden_cases

FILES = ("compressed_tensors", "compressed_tensors_actorder", "gptq", "autoround", "awq", "fp8", "fp4", "mlx")
CASES = [case for file in FILES for case in golden_cases.load_cases(file)]
DTYPES = [np.int32, np.uint32, np.uint8, np.int64, np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
VALUES = [None, 0, 1, -1, 3, 4, 5, 8, 16, 1 << 40, 2.5, True, False, "4", "", [], {}, [4], [0, 0], [128, 128], {"a": 1}]


@st.composite
def mutations(draw):
    kinds = ["drop", "dtype", "cut", "grow", "flat", "rename", "empty", "noise", "config", "deeper"]
    kind = draw(st.sampled_from(kinds))
    return kind, draw(st.integers(0, 63)), draw(st.integers(0, 63)), draw(st.integers(0, 2**32 - 1))


NAMES = ["weight", "weight_scale", "scales", "qweight", "g_idx", "biases", "weight_scale_2", "weight_packed", "other"]


def mutate(tensors, config, mutation):
    kind, first, second, seed = mutation
    if kind == "config":
        return tensors, replaced(config, first, VALUES[second % len(VALUES)])
    part = sorted(tensors)[first % len(tensors)]
    array, tensors = tensors[part], dict(tensors)
    axis = second % max(array.ndim, 1)
    if kind == "drop":
        del tensors[part]
    elif kind == "dtype":
        with np.errstate(all="ignore"):
            tensors[part] = array.astype(np.float32).astype(DTYPES[second % len(DTYPES)])
    elif kind == "cut" and array.ndim:
        tensors[part] = np.take(array, range(array.shape[axis] - 1), axis)
    elif kind == "grow" and array.ndim:
        tensors[part] = np.concatenate([array, array], axis)
    elif kind == "flat":
        tensors[part] = array.reshape(-1)
    elif kind == "rename":
        tensors[NAMES[second % len(NAMES)]] = tensors.pop(part)
    elif kind == "empty" and array.ndim:
        tensors[part] = np.take(array, [], axis)
    elif kind == "noise" and array.size:
        noise = np.random.default_rng(seed).integers(0, 256, array.nbytes, np.uint8)
        tensors[part] = noise.view(array.dtype).reshape(array.shape)
    elif kind == "deeper":
        tensors[part] = array[None]
    return tensors, config


def replaced(config, at, value):
    """The configuration with one of its values, at any depth, replaced."""
    paths = []

    def visit(node, path):
        for key in node if isinstance(node, dict) else range(len(node)):
            paths.append((*path, key))
            if isinstance(node[key], dict | list):
                visit(node[key], (*path, key))

    copy = json.loads(json.dumps(config))
    visit(copy, ())
    *path, last = paths[at % len(paths)]
    node = copy
    for key in path:
        node = node[key]
    node[last] = value
    return copy


def loaded(folder, tensors, config):
    """Opens and loads a checkpoint: stored weights, loaded weights and "", or nothing and the error's message."""
    try:
        stored_weights = golden_cases.read_weights(folder, tensors, config)
        return stored_weights, {name: stored.load(None) for name, stored in stored_weights.items()}, ""
    except CheckpointError as error:
        return {}, {}, str(error)


@given(st.integers(0, len(CASES) - 1), st.lists(mutations(), min_size=1, max_size=3))
def test_anything_gives_one_clear_error_or_a_whole_weight(tmp_path_factory, index, changes):
    case = CASES[index]
    tensors, config = case.tensors, case.config
    for change in changes:
        if tensors:
            tensors, config = mutate(tensors, config, change)
    full = {f"{golden_cases.MODULE_NAME}.{part}": array for part, array in tensors.items()}
    if not full:
        return
    stored_weights, weights, message = loaded(tmp_path_factory.mktemp("hostile"), full, config)
    assert message.isprintable()
    assert len(message) < 1000
    for name, weight in weights.items():
        stored = stored_weights[name]
        assert weight.shape == stored.shape
        if isinstance(weight, QuantizedTensor):
            parts = {key: (array.shape, array.dtype) for key, array in weight.components().items()}
            assert parts == stored.spec.component_shapes(stored.shape)
            if all(kind != "noise" for kind, *_ in changes):  # random scales may be near the end of the range
                assert np.isfinite(dequantize(weight)).all()
        else:
            assert stored.spec is None
            assert weight.dtype == stored.dtype
