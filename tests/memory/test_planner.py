"""The memory plan: exact counts, sharding against JAX's own, and that "fits" is the truth about the numbers."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from glm_jax.cache.latent import CACHE_AXES as CACHE_AXES
from glm_jax.config import Config
from glm_jax.errors import MemoryPlanError, ShardingError
from glm_jax.memory import (
    MTP_LAYER,
    MemoryPlan,
    expected_active_experts,
    known_gpus,
    parse_gpus,
    plan_memory,
    plan_memory_on_devices,
)
from glm_jax.memory import devices as hardware
from glm_jax.memory.estimates import (
    PlacementSpec,
    cache_bytes,
    estimate_workspace,
    prefill_chunk_length,
    weight_group_name,
)
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.storage import abstract_params

FLASH = Config.flash()
SMALL = FLASH.replace(
    vocab_size=400,
    hidden_size=48,
    num_hidden_layers=3,
    mlp_layer_types=("dense", "sparse", "sparse"),
    num_attention_heads=20,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=80,
    moe_intermediate_size=40,
    n_routed_experts=8,
    max_position_embeddings=5000,
    eos_token_ids=(),
    pad_token_id=None,
)
VARIANTS = {
    "flash": FLASH,
    "small": SMALL,
    "no q rank": SMALL.replace(q_lora_rank=None),
    "tied": SMALL.replace(tie_word_embeddings=True),
    "own copies": SMALL.replace(mtp_own_embeddings=True),
    "no prediction layer": SMALL.replace(num_nextn_predict_layers=0),
    "no shared expert": SMALL.replace(n_shared_experts=0),
    "two shared experts": SMALL.replace(n_shared_experts=2),
    "all dense": SMALL.replace(mlp_layer_types=("dense",) * 3),
    "dense in between": SMALL.replace(mlp_layer_types=("sparse", "dense", "sparse")),
}
LARGE = 10**15


def on(cfg: Config = FLASH, gpu: str = "h100", **options) -> MemoryPlan:
    card, count = parse_gpus(gpu)
    rules = get_sharding_preset("latency" if count > 1 else "replicated")
    free = math.floor(card.memory_bytes * 0.95)
    return plan_memory(cfg, device_bytes=free, devices=count, rules=rules, bandwidth=card.bandwidth, **options)


def test_the_real_model_in_numbers():
    made = on()
    assert made.parameters == 29_943_393_920
    assert made.parameters_on_disk == 31_221_488_576
    assert made.weight_groups[MTP_LAYER].parameters == 643_706_176
    # Two bytes each; the router biases, 46 x 64 of them, have four.
    assert made.weight_bytes == 59_886_793_728 == 2 * 29_943_393_920 + 2 * 46 * 64
    assert made.mtp_bytes == 2 * 643_706_176 + 2 * 64
    assert made.cache_bytes_per_token == 54_144
    assert on(cache_dtype="float32").cache_bytes_per_token == 108_288
    assert on(dtype="float32").weight_bytes == 4 * 29_943_393_920
    assert made.context == made.max_context == 202_752
    assert made.requirement.cache == 202_752 * 54_144


def test_the_real_model_by_part():
    assert {name: part.parameters for name, part in on().weight_groups.items()} == {
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
def test_bytes_are_those_of_the_parameter_tree(cfg, dtype):
    tree = jax.tree.leaves(abstract_params(cfg, dtype))
    made = plan_memory(cfg, device_bytes=LARGE, dtype=dtype)
    assert made.weight_bytes + made.mtp_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in tree)
    assert made.requirement.weights == made.weight_bytes + made.mtp_bytes
    assert plan_memory(cfg, device_bytes=LARGE, dtype=dtype, mtp=False).requirement.weights == made.weight_bytes
    assert sum(part.parameters for part in made.weight_groups.values()) == sum(leaf.size for leaf in tree)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_has_a_part(cfg):
    paths = [path for path, _ in leaves_with_path(param_specs(cfg))]
    assert set(map(weight_group_name, paths)) <= set(plan_memory(cfg, device_bytes=LARGE).weight_groups)


def test_parameters_on_disk_count_what_checkpoints_store():
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
def test_device_bytes_are_those_of_jax_shardings(rules):
    mesh = make_mesh(8, (2, 4))
    cfg = SMALL.replace(vocab_size=400, n_routed_experts=8)
    tree = jax.tree.leaves(abstract_params(cfg, "float32", rules, mesh))
    expected = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in tree)
    made = plan_memory(
        cfg, device_bytes=LARGE, dtype="float32", rules=rules, devices=dict(mesh.shape), context=96, sequences=6
    )
    assert made.devices == 8
    assert made.requirement.weights == expected
    shape = (cfg.num_hidden_layers, 6, 96, cfg.cache_width)
    shard = jax.NamedSharding(mesh, rules.spec(*CACHE_AXES)).shard_shape(shape)
    assert made.requirement.cache == 4 * math.prod(shard)


def test_the_cache_is_whole_on_every_device_when_heads_are_split():
    alone, four = on(gpu="b200", context=8192), on(gpu="b200x4", context=8192)
    assert four.requirement.cache == alone.requirement.cache == 8192 * 54_144
    assert alone.requirement.weights / 4 < four.requirement.weights < alone.requirement.weights / 3


@pytest.mark.parametrize(
    ("rows", "experts", "weight_gb"),
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
def test_bytes_read_per_step(rows, experts, weight_gb):
    made = on(context=1024, sequences=rows)
    assert expected_active_experts(FLASH, rows) == pytest.approx(experts, abs=0.05)
    assert (made.decode_bytes - rows * 1024 * 54_144) / 1e9 == pytest.approx(weight_gb, abs=0.05)


def test_the_bound_of_one_sequence():
    active = 3_262_377_600 + 317_194_240  # parameters in the layers, and the head
    made = on(context=32_768)
    assert made.decode_bytes == 2 * active + 2 * 46 * 64 + 32_768 * 54_144
    assert made.bound_tokens_per_s == pytest.approx(3_352_320_000_000 / made.decode_bytes)
    assert plan_memory(FLASH, device_bytes=LARGE).bound_tokens_per_s is None


def test_a_tied_head_is_read():
    tied, untied = (plan_memory(VARIANTS[name], device_bytes=LARGE, context=8) for name in ("tied", "small"))
    assert tied.decode_bytes == untied.decode_bytes
    assert tied.weight_bytes < untied.weight_bytes


# Temporary MiB that XLA asked for when the prefill step of the real width was compiled for an H100 (jax 0.10.2), by
# rows, chunk and slots: for the first 3 layers, and in the second row for all 47 (121.7 for 3).
MEASURED = [
    (1, 512, 2048, 239.0),
    (1, 512, 4096, 155.9),
    (1, 512, 32_768, 160.5),
    (1, 512, 202_752, 347.2),
    (1, 1024, 4096, 226.0),
    (4, 512, 4096, 489.9),
    (16, 512, 4096, 1654.0),
]


@pytest.mark.parametrize(("rows", "chunk", "slots", "mib"), MEASURED)
def test_the_workspace_covers_what_the_compiler_asks_for(rows, chunk, slots, mib):
    space = estimate_workspace(FLASH, PlacementSpec(), rows, slots, chunk)
    assert mib * 2**20 <= space.activations + space.layer_weights <= 1.8 * mib * 2**20
    assert space.logits >= 4 * FLASH.vocab_size * max(rows, chunk)


# The same on a CPU: float32 weights, and bfloat16 ones, which a CPU widens.
@pytest.mark.parametrize(
    ("dtype", "cache", "rows", "slots", "mib"),
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
def test_the_workspace_covers_what_a_cpu_asks_for(dtype, cache, rows, slots, mib):
    space = estimate_workspace(FLASH, PlacementSpec(dtype=dtype, cache_dtype=cache, on_cpu=True), rows, slots)
    assert mib * 2**20 <= space.total


def test_the_workspace_of_an_8_bit_cache_counts_rows_as_stored_and_as_read():
    """In bfloat16, 16,384 slots: rows as stored, and a block of keys and the chunk, in float32 and rounded."""
    plain, narrow = (
        estimate_workspace(FLASH, PlacementSpec(cache_dtype=kind), 2, 16_384, 512) for kind in ("bfloat16", "int8")
    )
    stored, wide = 16_384 * (576 + 8), (1024 + 512) * 576 * (4 + 2)
    assert plain.activations - narrow.activations == 2 * (16_384 * 576 * 2 - stored - wide)


def test_bfloat16_in_place_of_float32_leaves_an_8_bit_cache_as_it_is():
    made = on(gpu="h100", dtype="float32", cache_dtype="fp8", context=4096)
    assert made.memory_model.with_dtype("bfloat16").placement.cache_dtype == "fp8"
    assert "cache_dtype" not in made.oom_message()


@pytest.mark.parametrize(
    ("rows", "on_cpu", "tokens"), [(1, False, 2048), (8, False, 1024), (64, False, 512), (1, True, 512)]
)
def test_few_rows_have_longer_chunks_on_a_gpu(rows, on_cpu, tokens):
    assert prefill_chunk_length(rows, on_cpu=on_cpu) == tokens
    placement = PlacementSpec(on_cpu=on_cpu)
    assert estimate_workspace(FLASH, placement, rows, 8192) == estimate_workspace(FLASH, placement, rows, 8192, tokens)


def test_splitting_makes_the_workspace_smaller():
    alone = estimate_workspace(FLASH, PlacementSpec(), 4, 8192)
    split = PlacementSpec(rules=get_sharding_preset("latency"), axis_sizes=(("data", 1), ("model", 4)))
    assert estimate_workspace(FLASH, split, 4, 8192).total < alone.total


CONFIGS = st.sampled_from(list(VARIANTS.values()))
# Both have 20 heads, but widths of 1,536 and 10,240 divide over fewer devices.
SPLITS = st.sampled_from(
    [(cfg, n) for cfg in VARIANTS.values() for n in ([1, 2, 4] if cfg is FLASH else [1, 2, 4, 5, 10, 20])]
)
DTYPES = st.sampled_from(["bfloat16", "float32"])
CACHES = st.sampled_from([None, "bfloat16", "float32", "int8", "fp8"])
BUDGETS = st.one_of(st.integers(0, 10**8), st.integers(10**8, 3 * 10**11))


def split_plan(cfg, devices, **options) -> MemoryPlan:
    return plan_memory(
        cfg, devices=devices, rules=get_sharding_preset("latency" if devices > 1 else "replicated"), **options
    )


@given(SPLITS, DTYPES, CACHES, st.booleans(), st.data())
def test_more_never_needs_less(split, dtype, cache_dtype, on_cpu, data):
    cfg, devices = split
    setup = split_plan(cfg, devices, device_bytes=0, dtype=dtype, cache_dtype=cache_dtype, on_cpu=on_cpu).memory_model
    lengths = st.one_of(st.integers(1, cfg.max_position_embeddings), st.integers(2040, 2060))
    short, long = sorted(data.draw(st.tuples(lengths, lengths)))
    few, many = sorted(data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300))))
    assert setup.requirement(few, short).total <= setup.requirement(few, long).total
    assert setup.requirement(few, short).total <= setup.requirement(many, short).total
    assert min(setup.requirement(few, short)) >= 0


@given(SPLITS, st.integers(1, 5000), st.integers(1, 100))
def test_more_devices_never_need_more_each(split, context, rows):
    cfg, devices = split
    fewer, more = (
        split_plan(cfg, n, device_bytes=LARGE, context=context, sequences=rows, bandwidth=10**12) for n in (1, devices)
    )
    assert more.requirement.total <= fewer.requirement.total
    assert more.bound_tokens_per_s >= fewer.bound_tokens_per_s


@given(SPLITS, DTYPES, BUDGETS, st.integers(1, 5000), st.integers(1, 100), st.booleans())
def test_the_longest_and_the_most_that_fit_are_just_that(split, dtype, budget, context, rows, mtp):
    cfg, devices = split
    made = split_plan(cfg, devices, device_bytes=budget, dtype=dtype, context=context, sequences=rows, mtp=mtp)
    fits, longest, most = made.memory_model.fits, made.max_context, made.max_sequences
    assert 0 <= longest <= cfg.max_position_embeddings
    assert longest == 0 or fits(1, longest)
    assert longest == cfg.max_position_embeddings or not fits(1, longest + 1)
    assert most == 0 or fits(most, context)
    assert not fits(most + 1, context)
    assert made.fits == (rows <= most) == (made.requirement.total <= budget)
    assert made.fits is fits(rows, context)


@given(CONFIGS, BUDGETS, st.integers(1, 20))
def test_the_context_is_the_longest_unless_given(cfg, budget, rows):
    made = plan_memory(cfg, device_bytes=budget, sequences=rows)
    assert made.context == max(1, made.memory_model.max_context(rows))
    assert made.fits == (made.memory_model.max_context(rows) > 0)


@settings(max_examples=40)
@given(SPLITS, DTYPES, BUDGETS, st.integers(1, 5000), st.integers(1, 100))
def test_a_refusal_is_raised_exactly_when_it_must_and_its_sum_is_right(split, dtype, budget, context, rows):
    cfg, devices = split
    made = split_plan(cfg, devices, device_bytes=budget, dtype=dtype, context=context, sequences=rows)
    if made.fits:
        assert made.require_fits() is made
        return
    with pytest.raises(MemoryPlanError) as caught:
        made.require_fits()
    assert str(caught.value) == made.oom_message()
    assert sum(made.requirement) == made.requirement.total > budget


def test_the_plan_is_plain_json():
    record = json.loads(json.dumps(on(context=32_768, sequences=2).to_json()))
    assert record["fits"] is True
    assert record["parameters"] == 29_943_393_920
    assert record["device_needs"]["total"] == sum(record["device_needs"][k] for k in ("weights", "cache", "workspace"))
    assert sum(part["nbytes"] for part in record["parts"].values()) == record["weight_bytes"] + record["mtp_bytes"]


def test_a_refusal_shows_the_arithmetic_and_what_would_fit():
    made = on(gpu="rtx6000-adax2", context=32_768, sequences=16)
    assert made.oom_message().splitlines() == [
        "30.73 GB weights + 28.39 GB cache (16 sequences of 32,768 tokens at 54,144 bytes) + 2.08 GB workspace "
        "= 61.21 GB, but each of the 2 devices has 48.95 GB",
        "what would fit: 9 sequences of that length",
        "what would fit: a context of 18,916 tokens for each sequence",
        'what would fit: weights in fewer bits, with quantize="int8"',
        'what would fit: 8 bits per cached value, with cache_dtype="int8" or "fp8"',
        "what would fit: 4 such devices, with mesh=4",
    ]
    # What it says is true, and one more is too much.
    assert on(gpu="rtx6000-adax2", context=32_768, sequences=9).fits
    assert not on(gpu="rtx6000-adax2", context=32_768, sequences=10).fits
    assert on(gpu="rtx6000-adax2", context=18_916, sequences=16).fits
    assert not on(gpu="rtx6000-adax2", context=18_917, sequences=16).fits
    for kind in ("int8", "fp8"):
        assert on(gpu="rtx6000-adax2", context=32_768, sequences=16, cache_dtype=kind).fits
    assert made.memory_model.with_quantization("int8").fits(16, 32_768)
    assert on(gpu="rtx6000-adax4", context=32_768, sequences=16).fits


def test_a_refusal_of_the_weights_themselves_offers_fewer_bits_or_more_devices():
    lines = on(gpu="rtx4090", context=100).oom_message().splitlines()
    assert lines[1:] == [
        'what would fit: weights in fewer bits, with quantize="int4"',
        "what would fit: 4 such devices, with mesh=4",
    ]
    alone = on(gpu="rtx4090")
    assert (alone.fits, alone.context, alone.max_context, alone.max_sequences) == (False, 1, 0, 0)
    assert "1 sequence of 1 token at" in alone.oom_message()


def test_a_refusal_offers_bfloat16():
    made = on(gpu="h100", dtype="float32", context=4096)
    assert 'what would fit: half the bytes per value, with dtype="bfloat16"' in made.oom_message().splitlines()
    assert on(gpu="h100", dtype="bfloat16", context=4096).fits


def test_more_cpu_devices_are_not_offered_because_they_share_one_memory():
    assert "devices" not in plan_memory(FLASH, device_bytes=10**10, on_cpu=True).oom_message()


def test_a_gpu_of_which_jax_took_too_little_gets_a_line_for_the_notebook():
    size = known_gpus()["h100"].memory_bytes
    wanted = {"context": 100_000, "default_share": True}
    lines = plan_memory(FLASH, device_bytes=int(0.75 * size), **wanted).oom_message().splitlines()
    assert lines[-1] == 'import os; os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"'
    assert "75% of a GPU" in lines[-2]
    assert plan_memory(FLASH, device_bytes=int(0.95 * size), context=100_000).fits
    # Not where it would not help, and not where the share was chosen.
    assert (
        "import os"
        not in plan_memory(FLASH, device_bytes=int(0.75 * known_gpus()["l40s"].memory_bytes), **wanted).oom_message()
    )
    assert "import os" not in plan_memory(FLASH, device_bytes=int(0.75 * size), context=100_000).oom_message()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "context must be 1 to 202,752, the model's longest, not 0"),
        ({"context": 202_753}, "not 202,753"),
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"devices": 0}, "at least one device"),
    ],
)
def test_impossible_numbers_are_refused(options, words):
    with pytest.raises(MemoryPlanError, match=words):
        plan_memory(FLASH, device_bytes=LARGE, **options)


def test_devices_that_do_not_divide_the_model_are_refused():
    with pytest.raises(ShardingError, match="20 attention heads do not divide over 3"):
        plan_memory(FLASH, device_bytes=LARGE, devices=3, rules=get_sharding_preset("latency"))


def test_the_cards():
    assert list(known_gpus())[:5] == ["rtx6000-ada", "rtxpro6000", "h100", "h200", "b200"]
    for name, card in known_gpus().items():
        assert 20e9 < card.memory_bytes < 200e9, name
        assert 8e11 < card.bandwidth < 8e12, name
        assert card.source.startswith("https://"), name
        assert parse_gpus(name) == (card, 1)
        assert parse_gpus(f" {name.upper()}X16 ") == (card, 16)
    assert {name for name in known_gpus() if on(gpu=name).fits} == {"rtxpro6000", "h100", "h200", "b200", "a100-80gb"}


@pytest.mark.parametrize(
    "text", ["", "x4", "h101", "h100x", "h100x0", "h100x-1", "h100x4x2", "h100 x4", "rtx4091", "h100x1.5"]
)
def test_unknown_cards_are_refused_with_a_list(text):
    with pytest.raises(MemoryPlanError, match="there are rtx6000-ada, rtxpro6000, h100"):
        parse_gpus(text)


def test_a_close_name_is_offered():
    with pytest.raises(MemoryPlanError, match="did you mean rtx6000-ada"):
        parse_gpus("rtx6000ada")


def fake(kind: str = "NVIDIA H100 80GB HBM3", platform: str = "gpu", **stats: int) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats or None)


def test_the_limit_of_a_device_is_its_share_less_what_is_in_use():
    assert hardware.available_device_memory(fake(bytes_limit=1000)) == 1000
    assert hardware.available_device_memory(fake(bytes_limit=1000, bytes_in_use=300)) == 700
    assert hardware.available_device_memory(fake(bytes_limit=1000, bytes_in_use=1300)) == 0


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Files in which a kernel says how much memory there is: writes one."""
    own, groups = tmp_path / "self", tmp_path / "groups"
    for name, path in (("_MEMINFO", tmp_path / "meminfo"), ("_OWN_CGROUP", own), ("_CGROUPS", groups)):
        monkeypatch.setattr(hardware, name, path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_the_limit_of_a_cpu_is_the_memory_available(machine):
    whole = hardware.available_device_memory(jax.devices("cpu")[0])
    assert whole > 1 << 28
    machine("meminfo", "MemTotal:       8000 kB\nMemAvailable:   3000 kB\nSwapFree: 1 kB\n")
    assert hardware.available_host_memory() == 3000 * 1024
    machine("meminfo", "nothing known")
    assert hardware.available_host_memory() == whole


def test_a_container_leaves_what_it_does_not_use(machine):
    machine("self", "0::/\n")
    machine("groups/memory.max", "max\n")
    whole = hardware.available_host_memory()
    assert whole > 1 << 28
    machine("groups/memory.max", "1000000\n")
    assert hardware.available_host_memory() == 1_000_000
    machine("groups/memory.current", "700000\n")
    machine("groups/memory.stat", "anon 5\ninactive_file 100000\n")
    assert hardware.available_host_memory() == 400_000
    machine("groups/memory.current", "3000000\n")
    assert hardware.available_host_memory() == 0


def test_the_narrowest_of_nested_containers_counts(machine):
    machine("self", "0::/user/job\n")
    machine("groups/user/memory.max", "9000000\n")
    machine("groups/user/memory.current", "8800000\n")
    machine("groups/user/job/memory.max", "5000000\n")
    assert hardware.available_host_memory() == 200_000


def test_a_container_of_the_first_version(machine):
    machine("self", "5:cpu,cpuacct:/x\n4:memory:/job\n")
    machine("groups/memory/job/memory.limit_in_bytes", "5000000\n")
    machine("groups/memory/job/memory.usage_in_bytes", "4000000\n")
    machine("groups/memory/job/memory.stat", "inactive_file 7\ntotal_inactive_file 500000\n")
    assert hardware.available_host_memory() == 1_500_000


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3_352_320_000_000),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1_792_000_000_000),
        ("cpu", None),
    ],
)
def test_bandwidth_of_devices_at_hand(kind, bandwidth):
    assert hardware.device_bandwidth(fake(kind)) == bandwidth


def test_the_default_share_is_recognized(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert hardware.uses_default_memory_fraction(fake())
    assert not hardware.uses_default_memory_fraction(fake(platform="cpu"))
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert not hardware.uses_default_memory_fraction(fake())


def test_a_plan_for_devices_at_hand(monkeypatch):
    monkeypatch.setattr(hardware, "available_host_memory", lambda: 8_000_000)
    cpus = make_mesh(4)
    made = plan_memory_on_devices(SMALL, cpus, rules=get_sharding_preset("latency"), dtype="float32", context=64)
    assert (made.devices, made.device_bytes, made.bandwidth) == (4, 2_000_000, None)
    assert made.memory_model.placement.on_cpu
    assert plan_memory_on_devices(SMALL, jax.devices()[:1], context=64).device_bytes == 8_000_000
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    cards = [fake(bytes_limit=9 * 10**9, bytes_in_use=n) for n in (5, 10**9)]
    made = plan_memory_on_devices(SMALL, cards, rules=get_sharding_preset("latency"), context=64)
    assert (made.devices, made.device_bytes, made.bandwidth) == (2, 8 * 10**9, 3_352_320_000_000)
    assert made.memory_model.default_memory_fraction
    assert not made.memory_model.placement.on_cpu


def test_a_mesh_of_several_axes():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    made = plan_memory_on_devices(SMALL, mesh, rules=Rules(batch="data", heads="model"), context=10, sequences=4)
    assert made.devices == 8
    assert made.requirement.cache == cache_bytes(SMALL, PlacementSpec(), 2, 10)


def test_dtypes_may_be_given_as_jax_has_them():
    made = plan_memory(SMALL, device_bytes=LARGE, dtype=jnp.bfloat16, cache_dtype=jnp.dtype(jnp.float32), context=10)
    assert (made.memory_model.placement.dtype, made.memory_model.placement.cache_dtype) == ("bfloat16", "float32")
    assert made.requirement.cache == 10 * made.cache_bytes_per_token == 10 * 3 * 40 * 4
