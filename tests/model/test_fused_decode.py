"""The model in kernels equals the reference, in Triton's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import glm_jax
from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.model import GLM
from glm_jax.model.kernel_selection import unsupported_reason
from glm_jax.sampling import SamplerState, SamplingParams, sample
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from glm_jax.weights import TiledWeight
from glm_jax.weights.params import leaves_with_path, map_with_path, param_specs
from glm_jax.weights.random_init import init_params
from glm_jax.weights.tiling import ModelSharding, has_tiled_weights, tile_params, untile_params
from pallas_kernels import _launch
from tests.pallas_kernels.builders import assert_close

pytestmark = pytest.mark.kernels
BATCH, PROMPT = 2, 5


def small(**changes):
    fields = {
        "vocab_size": 96, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "kv_lora_rank": 64,
        "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": 64, "intermediate_size": 80,
        "moe_intermediate_size": 48, "n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "max_position_embeddings": 64, "num_nextn_predict_layers": 0,
        "mlp_layer_types": ("dense", "sparse", "sparse"), "eos_token_ids": (3,),
    }  # fmt: skip
    return Config.flash().replace(**{**fields, **changes})


def step(cfg, params, kernels, cache, tokens, positions):
    given = tile_params(params) if kernels else params
    return jax.jit(lambda p, t, at, c: GLM(cfg).apply({"params": p}, t, at, c))(given, tokens, positions, cache)


def after_prompt(cfg, params, dtype, tokens):
    cache = LatentCache.create(cfg, BATCH, 32, dtype)
    positions = jnp.broadcast_to(jnp.arange(PROMPT, dtype=jnp.int32), (BATCH, PROMPT))
    return GLM(cfg).apply({"params": params}, tokens, positions, cache)[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"n_shared_experts": 0, "norm_topk_prob": False}, marks=pytest.mark.soak),
        {"mlp_layer_types": ("dense", "dense", "dense"), "rope_interleave": False},
        pytest.param({"mlp_layer_types": ("sparse", "dense", "sparse")}, marks=pytest.mark.soak),
    ],
    ids=["usual", "no shared expert", "all dense", "experts first"],
)
def test_one_step(changes):
    cfg = small(**changes)
    params = init_params(cfg, 0, "float32")
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (BATCH, PROMPT)), jnp.int32)
    cache = after_prompt(cfg, params, "float32", tokens)
    assert unsupported_reason(cfg, tile_params(params)) is None
    positions = jnp.asarray([[PROMPT], [2]], jnp.int32)  # rows of different lengths
    expected, after = step(cfg, params, False, cache, tokens[:, :1], positions)
    found, written = step(cfg, params, True, cache, tokens[:, :1], positions)
    assert_close(found, expected, 5e-6)
    assert_close(written.data, after.data, 5e-6)


def test_several_tokens_of_a_row():
    """Several tokens per row, as in speculative decoding and short chunks."""
    cfg = small()
    params = init_params(cfg, 1, "float32")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (BATCH, PROMPT)), jnp.int32)
    cache = after_prompt(cfg, params, "float32", tokens)
    positions = jnp.broadcast_to(PROMPT + jnp.arange(3, dtype=jnp.int32), (BATCH, 3))
    expected, after = step(cfg, params, False, cache, tokens[:, :3], positions)
    found, written = step(cfg, params, True, cache, tokens[:, :3], positions)
    assert_close(found, expected, 5e-6)
    assert_close(written.data, after.data, 5e-6)


@pytest.fixture(scope="module")
def miniature():
    return glm_jax.LLM.load("tiny", dtype="float32", kernels="reference")


@pytest.mark.parametrize(
    ("quantize", "cache"),
    [
        ("int4", "float32"),
        pytest.param("int4-small", "int8", marks=pytest.mark.soak),
        pytest.param("int8", "fp8", marks=pytest.mark.soak),
        pytest.param(None, "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_the_miniature(quantize, cache):
    """Presets and caches: the teacher-forced divergence is small, and the next token is the same."""
    options = {"dtype": "float32", "quantize": quantize, "cache_dtype": cache}
    plain = glm_jax.LLM.load("tiny", **options, kernels="reference")
    kernels = glm_jax.LLM.load("tiny", **options, kernels="triton")
    assert has_tiled_weights(kernels.params)
    assert not has_tiled_weights(plain.params)
    cfg, text = plain.config, "def fib(n):\n    if n < 2:\n        return n"
    ids = jnp.asarray([plain.tokenizer.encode(text)], jnp.int32)
    start = LatentCache.create(cfg, 1, 64, cache, dequant_dtype="float32")
    seen = ids.shape[1] - 1
    positions = jnp.arange(seen, dtype=jnp.int32)[None]
    _, start = GLM(cfg).apply({"params": plain.params}, ids[:, :seen], positions, start)
    place = jnp.full((1, 1), seen, jnp.int32)
    logits = [
        jax.jit(GLM(cfg).apply)({"params": llm.params}, ids[:, seen:], place, start)[0][0, 0]
        for llm in (plain, kernels)
    ]
    first, second = (jax.nn.log_softmax(x) for x in logits)
    # A rounding of the cache may fall to either side; that costs less than the rounding itself.
    assert float(jnp.sum(jnp.exp(first) * (first - second))) < 1e-5
    assert int(jnp.argmax(first)) == int(jnp.argmax(second))


@pytest.mark.soak  # a prompt takes minutes; its parts are tested by themselves below
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"temperature": 0.9, "top_p": 1, "seed": 3}, {"temperature": 1.2, "top_p": 0.9, "seed": 4}],
    ids=str,
)
def test_generate(miniature, sampling):
    """End to end: prefill, decode loop and sampler."""
    kernels = glm_jax.LLM.load("tiny", dtype="float32", kernels="triton")
    options = {"max_tokens": 2, **sampling}
    prompt = miniature.tokenizer.encode("def fib(n):\n    if n <")[:9]  # longer than what the kernels take at once
    assert kernels.generate(prompt, **options).token_ids == miniature.generate(prompt, **options).token_ids


@pytest.mark.parametrize(
    ("sampling", "changes"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0.9, "top_p": 1}, {}),
        ({"temperature": 1.2, "top_p": 0.9}, {}),
        ({"temperature": 0.9, "top_p": 1}, {"qk_nope_head_dim": 40}),  # the layers go by the reference, and so the draw
    ],
    ids=str,
)
def test_a_step_draws_what_the_sampler_draws_from_its_logits(sampling, changes):
    cfg = small(num_hidden_layers=1, mlp_layer_types=("dense",), **changes)
    params = init_params(cfg, 0, "float32")
    tiled = tile_params(params)
    assert (unsupported_reason(cfg, tiled) is None) == (not changes)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (BATCH, 1)), jnp.int32)
    positions, cache = jnp.asarray([[0], [3]], jnp.int32), LatentCache.create(cfg, BATCH, 32, "float32")
    options = SamplingParams(**sampling)
    rows = SamplerState.create([options] * BATCH, [5, 6], [(0,)] * BATCH, vocab_size=96, valid_vocab=90)
    logits, expected = GLM(cfg).apply({"params": params}, tokens, positions, cache)
    run = jax.jit(lambda *given: GLM(cfg).apply({"params": tiled}, *given, rows, method="decode_and_sample"))
    found, after = run(tokens, positions, cache)
    assert found.tokens.tolist() == sample(logits[:, 0], rows, positions[:, 0] + 1).tokens.tolist()
    assert found.ok.all()
    assert_close(after.data, expected.data, 5e-6)


def test_parameters_come_out_of_their_tiles():
    cfg = small()
    params = init_params(cfg, 0, "float32")
    there = tile_params(params)
    assert isinstance(there["runs"]["1"]["moe"]["gate"], TiledWeight)
    back = untile_params(there)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_without_room_for_two_copies_stacks_are_laid_out_by_layers(monkeypatch):
    expected = glm_jax.LLM.load("tiny", quantize="int4", kernels="triton").params
    asked = []
    monkeypatch.setattr("glm_jax.checkpoint.loader._fits_second_copy", asked.append)
    found = glm_jax.LLM.load("tiny", quantize="int4", kernels="triton").params
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    stacks = [weight for weight in asked if len(weight.shape) > 2]
    assert any(all(array.is_deleted() for array in jax.tree.leaves(weight)) for weight in stacks)


def test_a_model_in_tiles_is_saved_as_any_other(tmp_path):
    for kernels in ("triton", "reference"):
        glm_jax.LLM.load("tiny", quantize="int4", kernels=kernels).save(tmp_path / kernels)
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("triton", "reference")]
    assert manifests[0] == manifests[1]


def test_what_kernels_cannot_run_goes_by_the_reference():
    cfg = small(qk_nope_head_dim=40)  # heads of 56
    params = tile_params(init_params(cfg, 0, "float32"))
    assert "multiples of 64" in unsupported_reason(cfg, params)
    tokens = jnp.zeros((1, 1), jnp.int32)
    cache = LatentCache.create(cfg, 1, 16, "float32")
    found = GLM(cfg).apply({"params": params}, tokens, tokens, cache)[0]
    expected = GLM(cfg).apply({"params": untile_params(params)}, tokens, tokens, cache)[0]
    assert_close(found, expected, 5e-6)


def test_a_prompt(monkeypatch):
    """More tokens than the fused decode kernels accept: products of many rows, prefill attention, experts in blocks."""
    cfg = small()
    params = init_params(cfg, 2, "float32")
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, cfg.vocab_size, (2, 37)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(37, dtype=jnp.int32), tokens.shape)
    cache = LatentCache.create(cfg, 2, 40, "float32")
    expected, after = step(cfg, params, False, cache, tokens, positions)
    names, interpret = set(), _launch.interpret

    def noted(kernel, *rest):
        names.add(kernel.fn.__name__)
        return interpret(kernel, *rest)

    monkeypatch.setattr(_launch, "interpret", noted)
    found, written = step(cfg, params, True, cache, tokens, positions)
    assert names == {"gated_linear_unit_kernel", "grouped_matmul_kernel", "flash_attention_kernel"}
    assert_close(found, expected, 5e-6)
    assert_close(written.data, after.data, 5e-6)


SPLIT = {
    "moe_intermediate_size": 128, "intermediate_size": 128, "vocab_size": 128, "num_attention_heads": 4,
    "qk_nope_head_dim": 48, "v_head_dim": 16,
}  # fmt: skip


def on_two_devices(cfg, params):
    """The same parameters, with each device's part in tiles."""
    rules, mesh = get_sharding_preset("latency"), make_mesh(2)
    held = dict(leaves_with_path(params))
    placed = map_with_path(
        lambda path, param: jax.device_put(held[path], NamedSharding(mesh, rules.spec(*param.axes))),
        param_specs(cfg),
    )
    return rules, mesh, tile_params(placed, ModelSharding(cfg, rules, mesh)), placed


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.soak), 40])
def test_two_devices(tokens):
    """A decode step in the fused kernels and a prompt, with heads, widths and vocabulary split over devices."""
    cfg = small(**SPLIT)
    params = init_params(cfg, 0, "float32")
    rules, mesh, there, _ = on_two_devices(cfg, params)
    numbers = np.random.default_rng(0).integers(0, cfg.vocab_size, (BATCH, max(tokens, PROMPT)))
    ids = jnp.asarray(numbers, jnp.int32)
    cache = LatentCache.create(cfg, BATCH, 64, "float32")
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (BATCH, tokens))
    expected, after = step(cfg, params, False, cache, ids[:, :tokens], positions)
    with jax.set_mesh(mesh):
        call = jax.jit(lambda p, t, at, c: GLM(cfg, rules).apply({"params": p}, t, at, c))
        over = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, jax.P())), (ids, positions, cache))
        found, written = call(there, over[0][:, :tokens], over[1], over[2])
        body = {name: there[name] for name in ("embed", "runs", "norm")}
        assert unsupported_reason(cfg, body, rules) is None
    assert_close(found, expected, 5e-6)
    assert_close(written.data, after.data, 5e-6)


def test_parts_come_out_of_their_tiles():
    cfg = small(**SPLIT)
    rules, mesh, there, placed = on_two_devices(cfg, init_params(cfg, 0, "float32"))
    back = untile_params(there, ModelSharding(cfg, rules, mesh))
    for (path, one), (_, other) in zip(leaves_with_path(back), leaves_with_path(placed), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim), path
        assert np.array_equal(one, other), path


def test_experts_on_devices_of_their_own_are_for_the_reference():
    cfg = small()
    problem = unsupported_reason(cfg, tile_params(init_params(cfg, 0, "float32")), Rules(experts="model"))
    assert problem == "they run on devices that split heads, widths and vocabulary, not experts"
