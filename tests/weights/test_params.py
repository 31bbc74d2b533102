"""Random parameters: reproducible bits, the shapes of the specs, and the scale of real models."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import Config
from glm_jax.model import GLM
from glm_jax.weights import Bfloat16Bits
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.random_init import init_params, random_matrix
from glm_jax.weights.storage import abstract_params
from tests.builders.hf_configs import odd_size_config
from tests.builders.jitted_model import QUICK_COMPILE, random_tokens

CFG = Config.from_hf(odd_size_config(num_hidden_layers=4))


@lru_cache
def made(seed: int = 5, cfg: Config = CFG) -> dict[Any, np.ndarray[Any, Any]]:
    """The leaves of random bfloat16 parameters by path, as NumPy arrays."""
    return {path: np.asarray(leaf) for path, leaf in leaves_with_path(init_params(cfg, seed, "bfloat16"))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes_are_those_of_the_table(dtype: str) -> None:
    promised = dict(leaves_with_path(abstract_params(CFG, dtype)))
    shapes = dict(leaves_with_path(jax.eval_shape(lambda: init_params(CFG, 5, dtype))))
    assert shapes.keys() == promised.keys()
    for path, leaf in shapes.items():
        assert (leaf.shape, leaf.dtype) == (promised[path].shape, promised[path].dtype), path


def test_bfloat16_matrices_are_held_as_bits_on_a_cpu() -> None:
    for path, leaf in leaves_with_path(abstract_params(CFG, "bfloat16")):
        assert isinstance(leaf, Bfloat16Bits) == (path[-1] != "router_bias" and "norm" not in path[-1]), path
    assert not any(isinstance(leaf, Bfloat16Bits) for _, leaf in leaves_with_path(abstract_params(CFG, "float32")))


def test_the_module_declares_the_same_tree() -> None:
    abstract = jax.eval_shape(GLM(CFG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    promised = abstract_params(CFG, "float32")
    assert jax.tree.structure(abstract) == jax.tree.structure(promised)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(promised), strict=True)
    )


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second, other = made(), made.__wrapped__(), made(6)
    for path, spec in leaves_with_path(param_specs(CFG)):
        assert np.array_equal(first[path], second[path])
        assert (spec.init == "normal") == (not np.array_equal(first[path], other[path])), path


def test_no_two_matrices_are_equal() -> None:
    seen: dict[bytes, Any] = {}
    for path, spec in leaves_with_path(param_specs(CFG)):
        if spec.init == "normal":
            for i, matrix in enumerate(made()[path].reshape(-1, *spec.shape[spec.stack_ndim :])):
                assert matrix.tobytes() not in seen, (path, i, seen[matrix.tobytes()])
                seen[matrix.tobytes()] = (path, i)


def test_fewer_layers_are_the_first_layers() -> None:
    fewer = CFG.replace(num_hidden_layers=3, mlp_layer_types=CFG.mlp_layer_types[:3])
    for path, leaf in made(5, fewer).items():
        deep = made()[path]
        assert np.array_equal(leaf, deep[: leaf.shape[0]] if path[0] == "runs" else deep), path


def test_one_matrix_can_be_drawn_alone() -> None:
    for path, spec in leaves_with_path(param_specs(CFG)):
        last = tuple(size - 1 for size in spec.shape[: spec.stack_ndim])
        layer = (last[0] + CFG.layer_groups[int(path[1])].start if path[0] == "runs" else 0) if last else 0
        alone = random_matrix(path, spec, 5, "bfloat16", layer, last[1:])
        assert alone.dtype == made()[path].dtype
        assert np.array_equal(alone, made()[path][last] if last else made()[path]), path


def test_logits_have_unit_scale() -> None:
    params = init_params(CFG, 5, "bfloat16")
    ids = jnp.asarray(random_tokens(odd_size_config(), 2, 24))
    logits, _ = jax.jit(GLM(CFG).apply, compiler_options=QUICK_COMPILE)({"params": params}, ids)
    assert 0.7 < np.asarray(logits).std() < 1.4


def test_matrices_have_the_scale_of_their_inputs() -> None:
    for path, spec in leaves_with_path(param_specs(CFG)):
        if spec.init == "normal" and path[-1] != "embed":
            assert spec.scale == pytest.approx(spec.shape[-1] ** -0.5), path
