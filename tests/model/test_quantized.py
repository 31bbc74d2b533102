"""Quantized weights in the model: every product equals that with the dequantized matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.checkpoint import load_params, quantize_source
from glm_jax.checkpoint.sources.memory import MemorySource
from glm_jax.checkpoint.sources.storage import source_storage
from glm_jax.errors import ConfigError, ShardingError
from glm_jax.model import GLM
from glm_jax.ops.linear import embed_tokens, linear, per_head_linear
from glm_jax.sharding import get_sharding_preset, make_mesh
from glm_jax.weights import QuantizedTensor, QuantRules, QuantSpec, dequantize
from glm_jax.weights.params import leaves_with_path
from glm_jax.weights.storage import Storage, abstract_params, plan_storage
from tests.builders.hf_configs import odd_size_config
from tests.builders.jitted_model import QUICK_COMPILE, JittedModel, is_close, make_positions, random_tokens
from tests.builders.quantized_tensors import QUANT_SPECS, random_quantized_tensor
from tests.builders.small_models import MODEL_VARIANTS, SmallModel

SHARDED = SmallModel(
    odd_size_config(
        num_attention_heads=4,
        num_key_value_heads=4,
        v_head_dim=8,
        vocab_size=132,
        moe_intermediate_size=16,
        intermediate_size=56,
    ),
    seed=40,
)

# What rounding to float32 leaves of products over 12 or 66 terms.
ROUNDING = 66 * 2.0**-24


def named(spec):
    return spec.name.replace(" ", "-")


def on_device(tensor):
    return tensor.map_components(lambda _, array: jnp.asarray(array))


def close(made, expected, terms):
    return np.abs(np.asarray(made) - expected).max() <= ROUNDING * terms.max()


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=named)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products(spec, rows):
    held = random_quantized_tensor(spec, (2, 3, 66, 12))
    matrix, weight = dequantize(held)[1, 2], on_device(held)
    x = np.random.default_rng(rows).standard_normal((rows, 12)).astype(np.float32)
    made = jax.jit(lambda x, i, k: linear(x, weight, i, k))(x, jnp.int32(1), jnp.int32(2))
    assert close(made, x @ matrix.T, np.abs(x) @ np.abs(matrix).T)
    plainly = linear(jnp.asarray(x), weight, 1, 2)  # indices that are numbers, outside jit
    assert close(plainly, x @ matrix.T, np.abs(x) @ np.abs(matrix).T)


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=named)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_by_head(spec, transpose):
    held = random_quantized_tensor(spec, (2, 3, 66, 12))
    matrices, weight = dequantize(held)[1], on_device(held)
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 66 if transpose else 12)).astype(np.float32)
    made = jax.jit(lambda x, i: per_head_linear(x, weight, i, transpose=transpose))(x, jnp.int32(1))
    form = "abno,noi->abni" if transpose else "abni,noi->abno"
    assert close(made, np.einsum(form, x, matrices), np.einsum(form, np.abs(x), np.abs(matrices)))


@pytest.mark.parametrize("spec", QUANT_SPECS, ids=named)
def test_embedding(spec):
    held = random_quantized_tensor(spec, (66, 12))
    ids = np.array([[1, 65, 3], [0, -1, 66]], np.int32)
    made = embed_tokens(on_device(held), jnp.asarray(ids))
    expected = np.where(((ids >= 0) & (ids < 66))[..., None], dequantize(held)[np.clip(ids, 0, 65)], 0)
    assert close(made, expected, np.abs(dequantize(held)))


def test_a_long_product_is_made_in_blocks_of_rows():
    """No array is as large as the dequantized matrix, even for prime sizes."""
    for outputs in (192, 131):
        held = random_quantized_tensor(QuantSpec(kind="int4", block=(1, 4)), (outputs, 64))
        weight = on_device(held)
        jaxpr = str(jax.make_jaxpr(lambda x, weight=weight: linear(x, weight))(jnp.zeros((1, 64))))
        x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
        assert close(linear(jnp.asarray(x), weight), x @ dequantize(held).T, np.abs(x) @ np.abs(dequantize(held)).T)
        assert "scan" in jaxpr


ODD = MODEL_VARIANTS["odd"]
EACH = "experts shared_experts dense_mlp attention head embedding".split()
RULES = {
    "int4": QuantRules(**dict.fromkeys(EACH, QuantSpec(kind="int4", block=(1, 2), zero="point", scale="float32"))),
    "int8": QuantRules(**dict.fromkeys(EACH, QuantSpec(kind="int8", block=(1, 0)))),
    "fp8": QuantRules(**dict.fromkeys(EACH, QuantSpec(kind="fp8", block=(1, 0), scale="float32"))),
    "mixed": QuantRules(experts=QuantSpec(kind="int4", block=(1, 2)), head=QuantSpec(kind="int8", block=(1, 0))),
}


def loaded(small, rules, mesh=None, layout="replicated"):
    """The small model's parameters, quantized while loading."""
    placed = get_sharding_preset(layout)
    source = quantize_source(MemorySource(small.cfg, small.params), RULES[rules], "float32", placed, mesh)
    return load_params(source, source.cfg, "float32", placed, mesh)


def dequantized(params):
    """The same values as plain arrays."""
    held = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)) if held(leaf) else leaf, params, is_leaf=held)


@pytest.mark.parametrize(
    ("rules", "variant"),
    [
        ("int4", "odd"),
        ("mixed", "all_experts"),
        pytest.param("int8", "tied", marks=pytest.mark.soak),
        pytest.param("fp8", "full_rank_queries", marks=pytest.mark.soak),
    ],
)
def test_a_quantized_model_is_the_model_of_its_values(rules, variant):
    small = MODEL_VARIANTS[variant]
    params = loaded(small, rules)
    assert any(isinstance(leaf, QuantizedTensor) for _, leaf in leaves_with_path(params))
    ids = random_tokens(small.config, 2, 20)
    plainly = JittedModel(small.cfg, dequantized(params))
    ours = JittedModel(small.cfg, params)
    for form in ("expanded", "absorbed"):
        assert is_close(ours.apply(ids, attention=form)[0], plainly.apply(ids, attention=form)[0])
    if small.cfg.num_nextn_predict_layers:
        hidden = np.random.default_rng(0).standard_normal((2, 20, small.cfg.hidden_size)).astype(np.float32)
        drafts = [
            JittedModel(small.cfg, p).apply(hidden, ids, method="draft")[0] for p in (params, dequantized(params))
        ]
        assert is_close(*drafts)


def test_one_token_at_a_time_is_the_whole():
    params = loaded(ODD, "int4")
    ids, runner = random_tokens(ODD.config, 1, 12), JittedModel(ODD.cfg, params)
    whole, cache = np.asarray(runner.apply(ids)[0]), runner.cache(1, 16)
    for at in range(12):
        step, cache = runner.apply(ids[:, at : at + 1], positions=make_positions(ids[:, at : at + 1], at), cache=cache)
        assert is_close(step[:, 0], whole[:, at])


@pytest.mark.parametrize("rules", RULES)
def test_what_is_loaded_is_what_was_announced(rules):
    storage, _ = plan_storage(ODD.cfg, RULES[rules])
    promised = dict(leaves_with_path(abstract_params(ODD.cfg, "float32", storage=storage)))
    made = dict(leaves_with_path(loaded(ODD, rules)))
    assert made.keys() == promised.keys()
    for path, leaf in made.items():
        assert (leaf.shape, leaf.dtype) == (promised[path].shape, promised[path].dtype), path
        described = [(x.shape, x.dtype) for x in jax.tree.leaves(promised[path])]
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)] == described, path
        assert isinstance(leaf, QuantizedTensor) == isinstance(promised[path], QuantizedTensor), path


@pytest.mark.parametrize("rules", ["int4", "int8"])
def test_over_four_devices(rules):
    """With a scale per output, or groups that fit the devices' parts, the layout does not change the codes."""
    mesh, placed = make_mesh(4), get_sharding_preset("latency")
    params = loaded(SHARDED, rules, mesh, "latency")
    alone = loaded(SHARDED, rules)
    for (path, leaf), (_, expected) in zip(leaves_with_path(params), leaves_with_path(alone), strict=True):
        assert np.array_equal(np.asarray(leaf), np.asarray(expected)), path
    ids = random_tokens(SHARDED.config, 2, 16)
    with jax.set_mesh(mesh):
        call = jax.jit(lambda p, t: GLM(SHARDED.cfg, placed).apply({"params": p}, t)[0], compiler_options=QUICK_COMPILE)
        made = call(params, ids)
    assert is_close(made, JittedModel(SHARDED.cfg, alone).apply(ids)[0])


def test_components_lie_where_the_weight_s_axes_say():
    mesh = make_mesh(4)
    params = loaded(SHARDED, "int8", mesh, "latency")
    down = params["runs"]["1"]["moe"]["down"]  # [l, E, D, F], split along F
    assert down.codes.sharding.spec == jax.P(None, None, None, "model")
    assert down.scales.sharding.spec == jax.P(None, None, None, None)
    gate = params["runs"]["1"]["moe"]["gate"]  # [l, E, F, D], split along F
    assert gate.scales.sharding.spec == jax.P(None, None, "model", None)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QuantSpec(kind="int4", block=(1, 16)), "blocks of 16 inputs, 4 on each device"),
        (QuantSpec(kind="int8", block=(1, 0), permuted=True), "inputs permuted"),
        (QuantSpec(kind="int4", block=(1, 0)), "3 inputs on each device, and packs 2 to a byte"),
    ],
)
def test_blocks_that_devices_would_cut_are_refused(spec, words):
    storage = Storage(((("runs", "1", "moe", "down"), spec),))
    cfg = SHARDED.cfg.replace(moe_intermediate_size=12) if spec.block == (1, 0) else SHARDED.cfg
    with pytest.raises(ShardingError, match=f"{words}.*make new groups"):
        abstract_params(cfg, "float32", get_sharding_preset("latency"), make_mesh(4), storage)


def test_parameters_that_are_not_the_config_s_are_refused():
    params = loaded(ODD, "int8")
    wrong = {**params, "norm": jnp.zeros(7), "extra": jnp.zeros(3)}
    del wrong["head"]
    with pytest.raises(ConfigError, match=r"norm is \(7,\), must be \(40,\); head is missing; extra is unknown"):
        GLM(ODD.cfg).apply({"params": wrong}, jnp.zeros((1, 2), jnp.int32))


def test_layers_stored_in_different_ways_are_runs_of_their_own():
    source = MemorySource(ODD.cfg.replace(run_starts=(2,)), _two_runs(loaded(ODD, "int4"), ODD.params))
    cfg, params = source.cfg, load_params(source, source.cfg, "float32")
    assert [run.count for run in cfg.layer_groups] == [1, 1, 1]
    assert source_storage(source).get(("runs", "1", "moe", "gate")) is not None
    assert source_storage(source).get(("runs", "2", "moe", "gate")) is None
    ids = random_tokens(ODD.config, 1, 10)
    assert is_close(JittedModel(cfg, params).apply(ids)[0], JittedModel(cfg, dequantized(params)).apply(ids)[0])


def _two_runs(first, second):
    """Layer 1 of one tree and layer 2 of another, in one layer group of both."""
    runs = {"0": first["runs"]["0"]}
    runs["1"] = jax.tree.map(lambda leaf: leaf[:1], first["runs"]["1"])
    runs["2"] = jax.tree.map(lambda leaf: leaf[1:], second["runs"]["1"])
    return {**first, "runs": runs}
