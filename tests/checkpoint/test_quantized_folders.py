"""Quantized checkpoints of every format: converted, split over devices, and used from the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import glm_jax
from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint import load
from glm_jax.checkpoint.sources.build import build_disk_arrays, to_plain_array
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.storage import source_storage
from glm_jax.errors import ShardingError
from glm_jax.sharding import get_sharding_preset, make_mesh
from glm_jax.weights import QuantizedTensor
from glm_jax.weights.params import leaves_with_path
from tests.builders import quantized_checkpoints, quantized_formats
from tests.builders.hf_configs import original_config, resaved_config

KINDS = ("experts", "shared", "attention", "dense", "head", "mtp")
FORMATS = (*quantized_formats.FORMATS, quantized_formats.MLX_FORMAT)
EACH = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
LATENCY = get_sharding_preset("latency")


def values(source, leaf):
    return np.concatenate([to_plain_array(piece) for _, piece in source.iter_chunks(leaf)])


@EACH
def test_conversion_keeps_every_value(tmp_path, form):
    """What comes back has the file's codes, scales and storage, and stands for the same numbers, bit for bit."""
    kinds, mtp = (KINDS, 1) if form.name in ("compressed-tensors", "nvfp4") else (("experts", "attention"), 0)
    spelling = resaved_config if form.name.startswith("g") else original_config
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, form, kinds, spelling, num_nextn_predict_layers=mtp)
    convert_checkpoint(pair.quantized, tmp_path / "ours")
    sources = [open_source(folder) for folder in (pair.quantized, tmp_path / "ours", pair.dequantized)]
    assert sources[0].cfg == sources[1].cfg
    assert sources[0].info.dtype == sources[1].info.dtype
    assert source_storage(sources[0]) == source_storage(sources[1])
    assert len(source_storage(sources[0]).specs) > 8
    for members in zip(*(source.layout().values() for source in sources), strict=True):
        for leaf, converted, exact in zip(*members, strict=True):
            kept, back = (build_disk_arrays(s, each) for s, each in ((sources[0], leaf), (sources[1], converted)))
            assert all(np.array_equal(kept[place], back[place]) for place in kept)
            assert np.array_equal(values(sources[1], converted), values(sources[2], exact)), leaf.name


# Columns in another order than their own cannot be split; MLX quantizes o_proj, whose 96 inputs are three groups.
WHOLE = [form for form in FORMATS if "order" in form.name or form is quantized_formats.MLX_FORMAT]
DIVIDED = [form for form in FORMATS if form not in WHOLE]


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("form", DIVIDED, ids=lambda form: form.name)
def test_over_devices(tmp_path, form, devices):
    """Experts over several devices: every shard holds its part of the codes."""
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, form, ("experts",), num_nextn_predict_layers=0)
    _, params, _ = load(pair.quantized, dtype="float32", rules=LATENCY, mesh=make_mesh(devices))
    _, whole, _ = load(pair.quantized, dtype="float32")
    expected = dict(leaves_with_path(whole))
    held = {path: leaf for path, leaf in leaves_with_path(params) if isinstance(leaf, QuantizedTensor)}
    assert {path[-1] for path in held} == {"gate", "up", "down"}
    for path, leaf in held.items():
        for name, array in leaf.components().items():
            assert np.array_equal(array, getattr(expected[path], name))
    codes = held["runs", "1", "moe", "gate"].codes
    assert {shard.data.shape[-2] for shard in codes.addressable_shards} == {codes.shape[-2] // devices}


@pytest.mark.parametrize("form", WHOLE, ids=lambda form: form.name)
def test_over_devices_that_it_does_not_divide_over(tmp_path, form):
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, form, ("experts",), num_nextn_predict_layers=0)
    with pytest.raises(ShardingError, match=r'does not divide over these devices: .*; load with quantize="int4"'):
        load(pair.quantized, dtype="float32", rules=LATENCY, mesh=make_mesh(2))


def test_blocks_that_devices_would_cut(tmp_path):
    """Square blocks of 32 outputs and inputs in an expert 96 wide: three to a side, and two devices."""
    pair = quantized_checkpoints.write_checkpoint_pair(
        tmp_path, quantized_formats.FORMATS_BY_NAME["fp8-block"], ("experts",), moe_intermediate_size=96
    )
    with pytest.raises(ShardingError, match="moe/down has blocks of 32 inputs, 48 on each device"):
        load(pair.quantized, rules=LATENCY, mesh=make_mesh(2))
    with pytest.raises(ShardingError, match="moe/gate has blocks of 32 outputs, 48 on each device"):
        load(pair.quantized, rules=LATENCY, mesh=make_mesh(2))


def test_generate_from_a_quantized_folder(tmp_path):
    """A folder as it was downloaded, with its tokenizer beside it: no flags say that it is quantized."""
    tiny = Path(glm_jax.__file__).parent / "tiny"
    stops = {key: json.loads((tiny / "config.json").read_text())[key] for key in ("vocab_size", "eos_token_id")}
    form = quantized_formats.FORMATS_BY_NAME["gptq"]
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, form, KINDS[:3], num_nextn_predict_layers=0, **stops)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, pair.quantized / name)
    command = [sys.executable, "-m", "glm_jax.generate", "--model", str(pair.quantized)]
    command += ["--max-tokens", "4", "--temperature", "0", "--", "def"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = glm_jax.LLM.load(pair.quantized).generate("def", max_tokens=4, temperature=0).text
    assert text.strip()
    assert done.stdout.rstrip("\n").endswith(text.rstrip("\n"))
