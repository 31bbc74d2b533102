"""Conversions that quantize: what is written, what is loaded, and that both are what quantizing while loading gives."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from convert.pipeline import convert_checkpoint
from glm_jax import checkpoint
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.validation import disk_array_name
from glm_jax.errors import CheckpointError, QuantError
from glm_jax.weights import QuantizedTensor, QuantRules, QuantSpec, dequantize
from glm_jax.weights.params import leaves_with_path
from tests.builders import hf_checkpoints, hf_configs
from tests.builders.calibration_checkpoint import write_calibration_checkpoint
from tests.checkpoint.assertions import read_converted_folder

CONFIG = hf_configs.odd_size_config(hidden_size=48, moe_intermediate_size=16, intermediate_size=56)
PRESETS = ("int4", "int4-small", "int4-experts", "int8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, dtype=hf_checkpoints.BFLOAT16)
    return hf_checkpoints.write_checkpoint(tmp_path_factory.mktemp("source"), CONFIG, tensors)


@pytest.fixture(scope="module")
def pristine(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "int4"
    convert_checkpoint(source, folder, quantize="int4")
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "int4")


def arrays(params):
    return {path: jax.tree.leaves(leaf) for path, leaf in leaves_with_path(params)}


def same(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    return all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for path in a
        for x, y in zip(a[path], b[path], strict=True)
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_converted_is_quantized_while_loading(source, tmp_path, preset, method):
    rules = QuantRules.resolve(preset)
    convert_checkpoint(source, tmp_path / "out", quantize=rules, method=method)
    cfg, params, info = checkpoint.load(tmp_path / "out", dtype="bfloat16", check=True)
    assert info.kind == "converted"
    if method == "mse":
        other, loaded, _ = checkpoint.load(source, dtype="bfloat16", quantize=preset)
        assert cfg == other
        assert same(params, loaded)
    kinds = {leaf.spec.kind for _, leaf in leaves_with_path(params) if isinstance(leaf, QuantizedTensor)}
    assert kinds == {"int4": {"int4", "int8"}, "int8": {"int8"}}.get(preset, {"int4"})


def test_saved_from_memory_is_the_same_folder(pristine, tmp_path):
    cfg, params, info = checkpoint.load(pristine, dtype="bfloat16")
    checkpoint.save(tmp_path / "again", cfg, params, origin=info)
    again = checkpoint.load(tmp_path / "again", dtype="bfloat16")
    assert again[0] == cfg
    assert same(again[1], params)


def test_a_synthetic_model_is_drawn_the_same_on_the_device(tmp_path):
    text = "synthetic:flash?layers=1&mtp=0"
    base = open_source(text)
    (leaf,) = (leaf for leaf in base.layout()["layer-00000"] if leaf.name == "attn.q_a")
    (piece,) = (piece for _, piece in base.iter_chunks(leaf))
    (drawn,) = (piece for _, piece in base.iter_device_chunks(leaf))  # pyright: ignore[reportAttributeAccessIssue]
    assert np.array_equal(np.asarray(drawn), piece)


def test_quantized_folders_say_so(pristine):
    manifest = json.loads((pristine / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert QuantSpec.from_json(manifest["storage"]["layer-00001/moe.gate"]) == QuantSpec(kind="int4", block=(1, 16))
    records = manifest["parts"]["layer-00001"]
    assert records["moe.gate.codes"]["shape"] == [7, 16, 24]
    assert records["moe.gate.codes"]["dtype"] == "uint8"
    assert "moe.gate" not in records
    assert records["moe.router"]["dtype"] == "bfloat16"


def test_plain_folders_stay_of_the_first_version(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["format_version"] == 1


def test_the_same_command_finds_it_done(source, folder):
    before = read_converted_folder(folder)
    report = convert_checkpoint(source, folder, quantize="int4")
    assert (report.written, read_converted_folder(folder)) == (0, before)
    report = convert_checkpoint(source, folder, quantize="int4", check=True)
    assert (report.written, read_converted_folder(folder)) == (0, before)


@pytest.mark.parametrize("other", [{"quantize": "int8"}, {"quantize": "int4", "method": "rtn"}, {}])
def test_other_options_need_force(source, folder, other):
    with pytest.raises(CheckpointError, match=r"with other options.*--force"):
        convert_checkpoint(source, folder, **other)


def test_damage_is_found_and_mended(source, folder):
    before = read_converted_folder(folder)
    chunk = next(path for path in (folder / "parts/layer-00001/moe.gate.codes/c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[0] ^= 255
    chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layer-00001/moe\.gate\.codes"):
        checkpoint.load(folder, check=True)
    assert convert_checkpoint(source, folder, quantize="int4", check=True).written == 1
    assert read_converted_folder(folder) == before


GATE, GATE_SCALES = "layer-00001/moe.gate", "layer-00001/moe.gate.scales"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["storage"][GATE].update(kind="int5"), "is damaged (impossible quantization"),
        (lambda m: m["storage"].update({"layer-00001/moe.up": "int4"}), "is damaged (a quantization has"),
        (lambda m: m["storage"].pop(GATE), f"arrays missing: {GATE}"),
        (lambda m: m["storage"].update({"layer-00009/moe.gate": m["storage"][GATE]}), "not in the model"),
        (lambda m: m["storage"][GATE].update(block=[1, 8]), f"wrong shape: {GATE_SCALES}"),
        (lambda m: m["storage"][GATE].update(scale="float16"), f"wrong dtype: {GATE_SCALES}"),
        (lambda m: m["parts"]["rest"]["norm"].update(dtype="int8"), "wrong dtype: rest/norm"),
    ],
)
def test_manifests_that_contradict_themselves(folder, change, words):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    assert words in str(caught.value)


def test_scales_that_are_not_finite_are_found_on_request(tmp_path):
    cfg, params, info = checkpoint.load(write_calibration_checkpoint(tmp_path), dtype="bfloat16", quantize="int8")
    gate = params["runs"]["1"]["moe"]["gate"]
    scales = np.array(gate.scales)
    scales[0, 1, 2] = ml_dtypes.bfloat16(np.nan)
    params["runs"]["1"]["moe"]["gate"] = gate.map_components(lambda name, array: scales if name == "scales" else array)
    checkpoint.save(tmp_path / "bad", cfg, params, origin=info)
    with pytest.raises(CheckpointError, match=r"NaN or infinite: layer-00001/moe\.gate\.scales \(1\)"):
        checkpoint.load(tmp_path / "bad", check=True)


def test_quantizing_again_is_said(pristine):
    _, params, info = checkpoint.load(pristine, dtype="float32", quantize="int8")
    assert any("quantized again" in note for note in info.notes)
    first = checkpoint.load(pristine, dtype="float32")[1]["runs"]["1"]["moe"]["gate"]
    second = params["runs"]["1"]["moe"]["gate"]
    assert second.spec.kind == "int8"
    assert np.abs(np.asarray(second) - np.asarray(first)).max() < np.abs(np.asarray(first)).max() / 100


def test_mixed_rules_from_a_dictionary(source):
    rules = QuantRules.from_json({"experts": {"kind": "fp8", "block": [8, 16], "scale": "float32"}, "mtp": None})
    _, params, _ = checkpoint.load(source, dtype="float32", quantize=rules)
    gate = params["runs"]["1"]["moe"]["gate"]
    assert gate.spec.kind == "fp8"
    assert not isinstance(params["mtp"]["moe"]["gate"], QuantizedTensor)
    plain = checkpoint.load(source, dtype="float32")[1]["runs"]["1"]["moe"]["gate"]
    assert np.abs(dequantize(gate) - plain).max() <= np.abs(np.asarray(plain)).max() * 2.0**-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int3"}, "no quantization 'int3'"),
        ({"quantize": "int4", "method": "best"}, "no method 'best'; there are rtn, mse, signround"),
        ({"method": "rtn"}, "rtn is a way to quantize: say to what, with quantize"),
    ],
)
def test_impossible_options(source, tmp_path, options, words):
    with pytest.raises(QuantError, match=words):
        convert_checkpoint(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_names_of_arrays():
    (leaf, *_) = open_source("synthetic:flash?layers=1").layout()["layer-00000"]
    assert disk_array_name(leaf, "") == "layer-00000/attn.norm"
    assert disk_array_name(leaf, "codes") == "layer-00000/attn.norm.codes"


@pytest.mark.parametrize(("bad", "method"), [(np.nan, "rtn"), (np.inf, "rtn"), (np.nan, "signround")])
def test_weights_that_are_no_numbers_are_never_hidden_in_codes(tmp_path, bad, method):
    folder = write_calibration_checkpoint(tmp_path)
    tensors = hf_checkpoints.read_tensors(folder)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][2, 5] = bad
    damaged = hf_checkpoints.write_checkpoint(
        tmp_path / "damaged", json.loads((folder / "config.json").read_text()), tensors
    )
    for asset_file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / asset_file, damaged / asset_file)
    if method == "rtn":
        with pytest.raises(CheckpointError, match=r"layer-00001/moe\.up holds weights that are NaN or infinite"):
            convert_checkpoint(damaged, tmp_path / "out", quantize="int4", method=method)
    with pytest.raises(CheckpointError, match=r"NaN or infinite: layer-00001/moe\.up \(1\)"):
        convert_checkpoint(damaged, tmp_path / "out", quantize="int4", method=method, check=True)
