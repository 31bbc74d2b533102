"""Bytes of weights, cache and workspace: exact counts, JAX's own shardings, and what compilers asked for."""

import math

import jax
import pytest

from glm_jax.cache.latent import CACHE_AXES
from glm_jax.checkpoint import load
from glm_jax.memory import active_weight_bytes, expected_active_experts, plan_memory
from glm_jax.memory.estimates import (
    MTP_LAYER,
    PlacementSpec,
    estimate_workspace,
    prefill_chunk_length,
    weight_group_name,
)
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.storage import abstract_params
from tests.memory.plans import FLASH, LARGE, SMALL, VARIANTS, plan_on


def test_totals_of_the_real_model():
    plan = plan_on()
    assert plan.parameters == 29_943_393_920
    assert plan.parameters_on_disk == 31_221_488_576
    assert plan.weight_groups[MTP_LAYER].parameters == 643_706_176
    # Each parameter has two bytes, except for the 46 x 64 router biases, which have four.
    assert plan.weight_bytes == 59_886_793_728 == 2 * 29_943_393_920 + 2 * 46 * 64
    assert plan.mtp_bytes == 2 * 643_706_176 + 2 * 64
    assert plan.cache_bytes_per_token == 54_144
    assert plan_on(cache_dtype="float32").cache_bytes_per_token == 108_288
    assert plan_on(dtype="float32").weight_bytes == 4 * 29_943_393_920
    assert plan.context == plan.max_context == 202_752
    assert plan.requirement.cache == 202_752 * 54_144


def test_weight_groups_of_the_real_model():
    assert {name: group.parameters for name, group in plan_on().weight_groups.items()} == {
        "embedding": 317_194_240,
        "attention": 47 * 21_759_232,
        "dense_mlp": 62_914_560,
        "routed_experts": 46 * 603_979_776,
        "shared_experts": 46 * 9_437_184,
        "routers": 46 * (131_072 + 64),
        "norms": 47 * 4096 + 2048,
        "head": 317_194_240,
        MTP_LAYER: 643_706_176,
    }


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weight_bytes_equal_those_of_the_parameter_tree(cfg, dtype):
    tree = jax.tree.leaves(abstract_params(cfg, dtype))
    plan = plan_memory(cfg, device_bytes=LARGE, dtype=dtype)
    assert plan.weight_bytes + plan.mtp_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in tree)
    assert plan.requirement.weights == plan.weight_bytes + plan.mtp_bytes
    assert plan_memory(cfg, device_bytes=LARGE, dtype=dtype, mtp=False).requirement.weights == plan.weight_bytes
    assert sum(group.parameters for group in plan.weight_groups.values()) == sum(leaf.size for leaf in tree)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_belongs_to_a_group(cfg):
    paths = [path for path, _ in leaves_with_path(param_specs(cfg))]
    assert set(map(weight_group_name, paths)) <= set(plan_memory(cfg, device_bytes=LARGE).weight_groups)


def test_parameters_on_disk_include_the_copies_in_checkpoints():
    table = SMALL.vocab_size * SMALL.hidden_size
    bare = plan_memory(VARIANTS["no prediction layer"], device_bytes=LARGE)
    assert bare.parameters_on_disk == bare.parameters
    copied, own = (plan_memory(VARIANTS[name], device_bytes=LARGE) for name in ("small", "own copies"))
    assert copied.parameters_on_disk == own.parameters_on_disk
    assert own.mtp_bytes - copied.mtp_bytes == 2 * 2 * table


RULES = {
    "latency": get_sharding_preset("latency"),
    "experts": Rules(experts="model"),
    "both": Rules(heads="model", experts="data", vocab="model"),
    "batch": Rules(batch="data", ffn="model"),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_device_bytes_equal_those_of_jax_shardings(rules):
    mesh = make_mesh(8, (2, 4))
    cfg = SMALL.replace(vocab_size=400, n_routed_experts=8)
    tree = jax.tree.leaves(abstract_params(cfg, "float32", rules, mesh))
    expected = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in tree)
    plan = plan_memory(
        cfg, device_bytes=LARGE, dtype="float32", rules=rules, devices=dict(mesh.shape), context=96, sequences=6
    )
    assert plan.devices == 8
    assert plan.requirement.weights == expected
    shape = (cfg.num_hidden_layers, 6, 96, cfg.cache_width)
    shard = jax.NamedSharding(mesh, rules.spec(*CACHE_AXES)).shard_shape(shape)
    assert plan.requirement.cache == 4 * math.prod(shard)


def test_every_device_holds_the_whole_cache_when_heads_are_split():
    alone, four = plan_on("b200", context=8192), plan_on("b200x4", context=8192)
    assert four.requirement.cache == alone.requirement.cache == 8192 * 54_144
    assert alone.requirement.weights / 4 < four.requirement.weights < alone.requirement.weights / 3


@pytest.mark.parametrize(
    ("sequences", "experts", "weight_gb"),
    [
        (1, 4, 7.16),
        (2, 7.75, 10.4),
        (4, 14.6, 16.3),
        (8, 25.8, 26.1),
        (16, 41.2, 39.5),
        (32, 55.9, 52.2),
        (64, 63, 58.4),
    ],
)
def test_weight_bytes_read_per_step(sequences, experts, weight_gb):
    plan = plan_on(context=1024, sequences=sequences)
    assert expected_active_experts(FLASH, sequences) == pytest.approx(experts, abs=0.05)
    assert (plan.decode_bytes - sequences * 1024 * 54_144) / 1e9 == pytest.approx(weight_gb, abs=0.05)


def test_decode_bound_of_one_sequence():
    active = 3_262_377_600 + 317_194_240  # parameters in the layers, and the head
    plan = plan_on(context=32_768)
    assert plan.decode_bytes == 2 * active + 2 * 46 * 64 + 32_768 * 54_144
    assert plan.bound_tokens_per_s == pytest.approx(3_352_320_000_000 / plan.decode_bytes)
    assert plan_memory(FLASH, device_bytes=LARGE).bound_tokens_per_s is None


def test_tied_head_counts_as_read():
    tied, untied = (plan_memory(VARIANTS[name], device_bytes=LARGE, context=8) for name in ("tied", "small"))
    assert tied.decode_bytes == untied.decode_bytes
    assert tied.weight_bytes < untied.weight_bytes


# MiB of temporaries that XLA reported when the prefill step of the real width was compiled for an H100 (jax 0.10.2), by
# sequences, chunk and slots: of the first 3 layers, in the second line of all 47 (121.7 of 3).
MEASURED = [
    (1, 512, 2048, 239.0),
    (1, 512, 4096, 155.9),
    (1, 512, 32_768, 160.5),
    (1, 512, 202_752, 347.2),
    (1, 1024, 4096, 226.0),
    (4, 512, 4096, 489.9),
    (16, 512, 4096, 1654.0),
]


@pytest.mark.parametrize(("sequences", "chunk", "slots", "mib"), MEASURED)
def test_workspace_covers_the_temporaries_of_a_gpu(sequences, chunk, slots, mib):
    space = estimate_workspace(FLASH, PlacementSpec(), sequences, slots, chunk)
    assert mib * 2**20 <= space.activations + space.layer_weights <= 1.8 * mib * 2**20
    assert space.logits >= 4 * FLASH.vocab_size * max(sequences, chunk)


# The same on a CPU, with float32 weights, and with bfloat16 weights, which a CPU converts to float32.
@pytest.mark.parametrize(
    ("dtype", "cache", "sequences", "slots", "mib"),
    [
        ("float32", "float32", 1, 4096, 299.3),
        ("float32", "float32", 1, 2048, 393.7),
        ("float32", "float32", 4, 4096, 883.1),
        ("bfloat16", "float32", 1, 4096, 1678.8),
        ("float32", "int8", 1, 4096, 252.6),
        ("float32", "fp8", 1, 2048, 393.7),
        ("float32", "fp8", 4, 4096, 696.3),
    ],
)
def test_workspace_covers_the_temporaries_of_a_cpu(dtype, cache, sequences, slots, mib):
    space = estimate_workspace(FLASH, PlacementSpec(dtype=dtype, cache_dtype=cache, on_cpu=True), sequences, slots)
    assert mib * 2**20 <= space.total


def test_workspace_of_an_8_bit_cache_counts_slots_as_stored_and_as_read():
    """Of 16,384 slots: all as stored, and a block of keys and the chunk in float32 and rounded to bfloat16."""
    plain, narrow = (
        estimate_workspace(FLASH, PlacementSpec(cache_dtype=kind), 2, 16_384, 512) for kind in ("bfloat16", "int8")
    )
    stored, wide = 16_384 * (576 + 8), (1024 + 512) * 576 * (4 + 2)
    assert plain.activations - narrow.activations == 2 * (16_384 * 576 * 2 - stored - wide)


@pytest.mark.parametrize(
    ("sequences", "on_cpu", "tokens"), [(1, False, 2048), (8, False, 1024), (64, False, 512), (1, True, 512)]
)
def test_small_batches_have_longer_chunks_on_a_gpu(sequences, on_cpu, tokens):
    assert prefill_chunk_length(sequences, on_cpu=on_cpu) == tokens
    placement = PlacementSpec(on_cpu=on_cpu)
    default, explicit = (estimate_workspace(FLASH, placement, sequences, 8192, chunk) for chunk in (None, tokens))
    assert default == explicit


def test_sharding_shrinks_the_workspace():
    alone = estimate_workspace(FLASH, PlacementSpec(), 4, 8192)
    split = PlacementSpec(rules=get_sharding_preset("latency"), axis_sizes=(("data", 1), ("model", 4)))
    assert estimate_workspace(FLASH, split, 4, 8192).total < alone.total


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_active_weight_bytes_count_the_active_experts(quantize):
    cfg, params, _ = load("tiny", dtype="float32", quantize=quantize)
    nbytes = {path: weight.nbytes for path, weight in leaves_with_path(params) if path[0] != "mtp"}
    experts = sum(
        size for path, size in nbytes.items() if path[-2:-1] == ("moe",) and path[-1] in ("gate", "up", "down")
    )
    looked_up = nbytes["embed",] / cfg.vocab_size  # the row of one token
    dense = sum(nbytes.values()) - experts - nbytes["embed",]
    fraction = cfg.num_experts_per_tok / cfg.n_routed_experts
    assert active_weight_bytes(cfg, params) == round(dense + experts * fraction + looked_up)
    fraction = expected_active_experts(cfg, 8) / cfg.n_routed_experts
    assert active_weight_bytes(cfg, params, 8) == round(dense + experts * fraction + 8 * looked_up)
