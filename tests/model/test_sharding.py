"""Four fake devices give the results of a single device, and every parameter is split as the rules say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.errors import ShardingError
from glm_jax.model import GLM, activation_names
from glm_jax.sharding import MESH_AXES, Rules, get_sharding_preset, make_mesh
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.random_init import init_params
from glm_jax.weights.storage import abstract_params
from tests.builders.hf_configs import odd_size_config
from tests.builders.jitted_model import QUICK_COMPILE, Array, is_close, make_positions, random_tokens
from tests.builders.small_models import SmallModel

# Sizes that four devices divide and that differ from each other.
SMALL = SmallModel(
    odd_size_config(
        num_attention_heads=4, num_key_value_heads=4, vocab_size=132, moe_intermediate_size=12, intermediate_size=56
    ),
    seed=40,
)
RULES = get_sharding_preset("latency")
LENGTH = 16


@pytest.fixture(scope="module")
def mesh() -> Any:
    return make_mesh(4)


@pytest.fixture(scope="module")
def sharded(mesh: Any) -> Any:
    """The weights of the small model, split over the mesh."""
    leaves = abstract_params(SMALL.cfg, "float32", RULES, mesh)
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), SMALL.params, leaves)


def on_mesh(mesh: Any, method: str | None = None, **static: Any) -> Any:
    model = GLM(SMALL.cfg, RULES)
    call = jax.jit(
        lambda p, i, a: model.apply({"params": p}, *i, **a, **static, method=method), compiler_options=QUICK_COMPILE
    )

    def run(params: Any, *inputs: Array, **arrays: Any) -> Any:
        with jax.set_mesh(mesh):
            return call(params, inputs, arrays)

    return run


def test_every_parameter_is_split_as_the_rules_say(mesh: Any) -> None:
    params = dict(leaves_with_path(init_params(SMALL.cfg, 0, "float32", RULES, mesh)))
    for path, spec in leaves_with_path(param_specs(SMALL.cfg)):
        expected = NamedSharding(mesh, PartitionSpec(*(getattr(RULES, a) if a else None for a in spec.axes)))
        assert params[path].sharding == expected, path
        assert {shard.device for shard in params[path].addressable_shards} == set(jax.devices()[:4])


@pytest.mark.parametrize(
    ("path", "dimension"),
    [
        ("embed", 0),
        ("head", 0),
        ("runs.0.attn.q_b", 1),
        ("runs.0.attn.k_b", 1),
        ("runs.0.attn.v_b", 1),
        ("runs.0.attn.o", 2),
        ("runs.0.mlp.gate", 1),
        ("runs.0.mlp.down", 2),
        ("runs.1.moe.up", 2),
        ("runs.1.moe.down", 3),
        ("runs.1.moe.shared_gate", 1),
        ("runs.1.moe.shared_down", 2),
        ("mtp.moe.gate", 2),
        ("runs.0.attn.q_a", None),
        ("runs.0.attn.kv_a", None),
        ("runs.1.moe.router", None),
        ("runs.1.moe.router_bias", None),
        ("mtp.eh_proj", None),
        ("norm", None),
    ],
)
def test_latency_splits_heads_widths_and_vocabulary(mesh: Any, path: str, dimension: int | None) -> None:
    leaf = dict(leaves_with_path(abstract_params(SMALL.cfg, "float32", RULES, mesh)))[tuple(path.split("."))]
    shard_shape = list(leaf.shape)
    if dimension is not None:
        shard_shape[dimension] //= 4
    assert leaf.sharding.shard_shape(leaf.shape) == tuple(shard_shape)


def test_logits_and_every_activation(mesh: Any, sharded: Any) -> None:
    names, ids = activation_names(SMALL.cfg), random_tokens(SMALL.config, 2, LENGTH, seed=41)
    logits, _, trace = on_mesh(mesh, trace=names)(sharded, ids)
    for row in range(2):
        record: dict[str, Array] = {}
        expected = SMALL.reference.logits(ids[row], record=record)
        assert np.abs(np.asarray(logits)[row] - expected).max() < 1e-4
        assert is_close(np.asarray(logits)[row], expected)
        assert all(is_close(np.asarray(trace[name])[row], record[name]) for name in names)


def test_greedy_tokens_and_cache(mesh: Any, sharded: Any) -> None:
    """A padded prompt, then steps: logits within 1e-4 of a single device's, and the same greedy tokens."""
    run, lengths = on_mesh(mesh), np.array([8, 3])
    ids = random_tokens(SMALL.config, 2, 8, seed=42)
    cache = LatentCache.create(SMALL.cfg, 2, LENGTH, jnp.float32, rules=RULES, mesh=mesh)
    positions = make_positions(ids)
    new: list[Array] = []
    for step in range(6):
        logits, cache = run(sharded, ids, positions=positions, cache=cache)
        if step == 0:
            one_device_logits, one_device_cache = SMALL.apply(ids, positions=positions, cache=SMALL.cache(2, LENGTH))
            assert np.abs(np.asarray(logits) - np.asarray(one_device_logits)).max() < 1e-4
            assert np.abs(np.asarray(cache.data) - np.asarray(one_device_cache.data)).max() < 1e-4
        newest = lengths - 1 if step == 0 else np.zeros(2, int)
        new.append(np.asarray(logits)[np.arange(2), newest].argmax(-1).astype(np.int32))
        ids, positions = new[-1][:, None], (lengths + step).astype(np.int32)[:, None]
    expected = [
        SMALL.reference.greedy(random_tokens(SMALL.config, 2, 8, seed=42)[r, : lengths[r]], 6) for r in range(2)
    ]
    assert np.stack(new, axis=1).tolist() == expected
    assert cache.data.sharding.is_fully_replicated


def test_draft(mesh: Any, sharded: Any) -> None:
    ids = random_tokens(SMALL.config, 1, LENGTH + 1, seed=43)
    hidden = SMALL.reference.hidden(ids[0, :-1])
    logits, state, _ = on_mesh(mesh, "draft")(sharded, hidden[None].astype(np.float32), ids[:, 1:])
    expected, expected_state = SMALL.reference.draft(hidden, ids[0, 1:])
    assert is_close(np.asarray(logits)[0], expected)
    assert is_close(np.asarray(state)[0], expected_state)


def test_rules_without_a_mesh_are_one_clear_error() -> None:
    with pytest.raises(ShardingError, match="set_mesh"):
        GLM(SMALL.cfg, RULES).apply({"params": SMALL.params}, jnp.zeros((1, 2), jnp.int32))


# -- invalid layouts --------------------------------------------------------------------------------------------------


def test_flash_on_eight_devices_is_rejected() -> None:
    with pytest.raises(ShardingError, match=r"20 attention heads do not divide over 8 devices.*1, 2, 4, 5, 10, 20"):
        RULES.validate(Config.flash(), make_mesh(8))


def test_flash_on_four_devices_is_possible(mesh: Any) -> None:
    RULES.validate(Config.flash(), mesh)


def test_a_mesh_axis_cannot_split_an_array_twice() -> None:
    with pytest.raises(ShardingError, match="twice"):
        Rules(heads="model", embed="model").spec("heads", "embed")


def test_rules_must_fit_the_mesh(mesh: Any) -> None:
    with pytest.raises(ShardingError, match="expert"):
        Rules(experts="expert").validate(SMALL.cfg, mesh)


def test_unknown_presets_and_missing_devices() -> None:
    with pytest.raises(ShardingError, match=r"fastest.*latency"):
        get_sharding_preset("fastest")
    for devices in (0, 9, -1):
        with pytest.raises(ShardingError, match=rf"mesh={devices}.*8 cpu"):
            make_mesh(devices)
    assert make_mesh(2).axis_names == MESH_AXES
    assert make_mesh(make_mesh(2)) == make_mesh(2)
