"""Quantized sources as folders of compressed-tensors: every code, every value, and what is said of them."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint import load, save
from glm_jax.checkpoint.sources.build import build_disk_arrays, to_plain_array
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.checkpoint.write.pack_quantized import (
    NON_LINEAR_PARAMS,
    build_quantization_config,
    pack_module,
    pack_unsupported_reason,
)
from glm_jax.config import Config
from glm_jax.weights import QuantRules, QuantSpec
from tests.builders import hf_checkpoints, quantized_checkpoints, quantized_formats
from tests.builders.hf_configs import original_config, resaved_config
from tests.checkpoint.assertions import assert_same_tensors
from tests.checkpoint.formats import golden_cases

INT4 = QuantSpec(kind="int4", block=(1, 32))
INT8 = QuantSpec(kind="int8", block=(1, 0), scale="float16")
POINT4 = QuantSpec(kind="int4", block=(1, 32), zero="point", scale="float32")
POINT8 = QuantSpec(kind="int8", block=(1, 16), zero="point")


def rules(everything, **changes):
    names = ("experts", "shared_experts", "dense_mlp", "attention", "head", "embedding")
    return QuantRules(**{**dict.fromkeys(names, everything), **changes})


RULES = {
    "symmetric": rules(INT8, experts=INT4),
    "points": rules(POINT8, experts=POINT4, head=None),
    "channels": rules(QuantSpec(kind="int4", block=(1, 0), zero="point"), attention=None, mtp=None),
}
STRAIGHT = [case for case in golden_cases.load_cases("compressed_tensors") if not re.search("int[236]", case.name)]


@pytest.mark.parametrize("case", STRAIGHT, ids=[case.name for case in STRAIGHT])
def test_modules_are_written_as_the_library_writes_them(tmp_path, case):
    tensor = golden_cases.read_weight(tmp_path, case.tensors, case.config).load(None)
    outputs = pack_module("m", tensor.spec, case.shape, lambda: tensor)
    assert {output.name for output in outputs} == {f"m.{part}" for part in case.tensors}
    for output in outputs:
        expected = case.tensors[output.name.removeprefix("m.")]
        written = np.concatenate(list(output.iter_blocks()))
        assert (written.dtype, written.shape) == (output.dtype, output.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(golden_cases.bit_patterns(written), golden_cases.bit_patterns(expected))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = original_config(**quantized_checkpoints.QUANTIZABLE_SIZES)
    folder = tmp_path_factory.mktemp("source")
    return hf_checkpoints.write_checkpoint(folder, config, hf_checkpoints.random_tensors(config, 3))


def arrays_of(source, leaf):
    return {place.name: array for place, array in build_disk_arrays(source, leaf).items()}


@pytest.mark.parametrize("name", RULES)
def test_codes_and_scales_come_back(source, tmp_path, name):
    """Our own reader gives the very arrays that were written, whatever the names and joins between."""
    convert_checkpoint(source, tmp_path / "out", to="safetensors", quantize=RULES[name], method="rtn")
    made = RequantizedSource(open_source(source), RULES[name], "rtn", dtype="float32", exclude=NON_LINEAR_PARAMS)
    back = open_source(tmp_path / "out")
    theirs = {(leaf.checkpoint_name, leaf.name): leaf for members in back.layout().values() for leaf in members}
    packed = 0
    for members in made.layout().values():
        for leaf in members:
            other = theirs[leaf.checkpoint_name, leaf.name]
            if made.quant_spec(leaf) is None:
                values = [to_plain_array(piece) for _, piece in made.iter_chunks(leaf)]
                (array,) = arrays_of(back, other).values()
                np.testing.assert_array_equal(array, np.concatenate(values))
                continue
            packed += 1
            assert back.quant_spec(other) == made.quant_spec(leaf)
            expected, found = arrays_of(made, leaf), arrays_of(back, other)
            assert expected.keys() == found.keys()
            assert all(np.array_equal(found[key], array) for key, array in expected.items()), leaf.name
    assert packed >= 10


@pytest.mark.parametrize("name", RULES)
def test_description_is_of_exactly_the_packed_modules(source, tmp_path, name):
    convert_checkpoint(source, tmp_path / "out", to="safetensors", quantize=RULES[name], method="rtn")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = list(said["config_groups"].values())
    tensors = hf_checkpoints.read_tensors(tmp_path / "out")
    for tensor, array in tensors.items():
        module, _, part = tensor.rpartition(".")
        matching = [group for group in groups if any(matches(target, module) for target in group["targets"])]
        ignored = any(matches(target, module) for target in said["ignore"])
        if part == "weight_packed":
            assert (len(matching), ignored) == (1, False), module
            bits = matching[0]["weights"]["num_bits"]
            rows, columns = tensors[f"{module}.weight_shape"]
            assert array.shape == (rows, -(-columns * bits // 32))
        elif part == "weight" and array.ndim == 2:
            assert not matching, module
            assert ignored or module.endswith("embed_tokens"), module
    assert any(r"mlp\.experts" in target for target in groups[0]["targets"])  # transformers takes the first such group


def matches(target, module):
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def test_what_cannot_be_packed_is_not_rounded(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "out", to="safetensors", quantize="int8", method="rtn")
    assert "not quantized, because the destination cannot hold it quantized: embed, mtp/eh_proj" in report.notes
    before, after = hf_checkpoints.read_tensors(source), hf_checkpoints.read_tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.layers.2.eh_proj.weight"):
        np.testing.assert_array_equal(before[name], after[name])
    assert "model.layers.2.self_attn.o_proj.weight" not in after


def test_the_same_from_a_converted_folder_and_from_memory(source, tmp_path):
    convert_checkpoint(
        source, tmp_path / "direct", to="safetensors", quantize=RULES["symmetric"], method="rtn", dtype="float32"
    )
    convert_checkpoint(source, tmp_path / "ours", quantize=RULES["symmetric"], method="rtn", dtype="float32")
    convert_checkpoint(tmp_path / "ours", tmp_path / "second", to="safetensors")
    cfg, params, info = load(tmp_path / "ours", dtype="float32")
    save(tmp_path / "third", cfg, params, origin=info, to="safetensors")
    assert_same_tensors(tmp_path / "second", tmp_path / "third")
    direct, second = hf_checkpoints.read_tensors(tmp_path / "direct"), hf_checkpoints.read_tensors(tmp_path / "second")
    # What no folder of this kind can hold packed was rounded in ours, and was not on the direct way.
    rounded = {name for name, array in direct.items() if not np.array_equal(array, second[name])}
    assert rounded == {
        "model.embed_tokens.weight",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.eh_proj.weight",
    }
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("direct", "second", "third")]
    assert written[0] == written[1] == written[2]


def test_a_damaged_folder_is_mended(source, tmp_path):
    first = convert_checkpoint(source, tmp_path / "out", to="safetensors", quantize="int4", method="rtn")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    assert convert_checkpoint(source, tmp_path / "out", to="safetensors", quantize="int4", method="rtn").written == 1
    assert shard.read_bytes() == whole
    changed = bytearray(whole)
    changed[-5] ^= 1
    shard.write_bytes(changed)
    report = convert_checkpoint(source, tmp_path / "out", to="safetensors", quantize="int4", method="rtn", check=True)
    assert (report.written, report.notes) == (1, first.notes)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("spelling", [original_config, resaved_config])
@pytest.mark.parametrize("form", quantized_formats.FORMATS, ids=lambda form: form.name)
def test_any_format_to_compressed_tensors(tmp_path, form, spelling):
    """Values stay as they are; what compressed-tensors' integers cannot hold is plain, and a note says so."""
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, form, ("experts", "shared", "attention"), spelling)
    report = convert_checkpoint(pair.quantized, tmp_path / "out", to="safetensors", dtype="float32")
    tensors = hf_checkpoints.read_tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    holds = form.config["quant_method"] in ("gptq", "awq", "auto-round", "compressed-tensors") and not re.search(
        "order|fp", form.name
    )
    assert any(name.endswith("weight_packed") for name in tensors) == holds == ("quantization_config" in config)
    assert holds != any("are written in float32" in note for note in report.notes)
    assert "quantization" not in config
    sources = [open_source(folder) for folder in (pair.dequantized, pair.quantized, tmp_path / "out")]
    for members in zip(*(source.layout().values() for source in sources), strict=True):
        for leaves in zip(*members, strict=True):
            first, *others = [values_of(source, leaf) for source, leaf in zip(sources, leaves, strict=True)]
            assert all(np.array_equal(first, other) for other in others), leaves[0].name


def values_of(source, leaf):
    return np.concatenate([to_plain_array(piece) for _, piece in source.iter_chunks(leaf)])


def test_order_of_columns_that_share_their_scale(tmp_path):
    """One scale per output: the file's order of columns is undone, and the matrix stays packed."""

    def pack(weight, seed):
        q = quantized_formats.quantize_integers(weight, 4, 0, symmetric=True, dtype=np.float32)
        return quantized_formats.PackedModule(quantized_formats.pack_gptq(q, 4, zero_points_minus_one=True), q.values)

    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": True}
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, quantized_formats.QuantFormat("gptq", pack, config))
    assert open_source(pair.quantized).quant_spec(expert_leaf(pair.quantized)).permuted
    assert not convert_checkpoint(pair.quantized, tmp_path / "out", to="safetensors").notes[1:]
    back = open_source(tmp_path / "out")
    values = values_of(back, expert_leaf(tmp_path / "out"))
    np.testing.assert_array_equal(values[2], pair.values["model.layers.1.mlp.experts.2.gate_proj.weight"])
    assert back.quant_spec(expert_leaf(tmp_path / "out")) == QuantSpec(kind="int4", block=(1, 0), scale="float32")


def expert_leaf(folder):
    return next(leaf for leaf in open_source(folder).layout()["layer-00001"] if leaf.name == "moe.gate")


def test_zero_points_beyond_the_bits_of_a_code(tmp_path):
    """GPTQ's 16 has no place in four bits: that matrix, and what is one module with it, are plain."""
    form = quantized_formats.FORMATS_BY_NAME["gptq"]
    meta = {**form.config, "meta": {"quantizer": ["autogptq:0.7"]}}
    pair = quantized_checkpoints.write_checkpoint_pair(
        tmp_path, quantized_formats.QuantFormat("gptq", form.pack, meta), ("experts", "attention")
    )
    tensors = hf_checkpoints.read_tensors(pair.quantized)
    tensors["model.layers.1.self_attn.q_a_proj.qzeros"] = np.full_like(
        tensors["model.layers.1.self_attn.q_a_proj.qzeros"], -1
    )
    config = json.loads((pair.quantized / "config.json").read_text())
    folder = hf_checkpoints.write_checkpoint(tmp_path / "sixteen", config, tensors)
    report = convert_checkpoint(folder, tmp_path / "out", to="safetensors")
    written = hf_checkpoints.read_tensors(tmp_path / "out")
    assert "a zero point of 16" in report.notes[-2]
    assert "serving engines fuse with them" in report.notes[-2]
    for module, part in {
        "1.self_attn.q_a": "weight",
        "1.self_attn.kv_a": "weight",
        "0.self_attn.q_a": "weight_packed",
    }.items():
        end = "proj_with_mqa" if module.endswith("kv_a") else "proj"
        assert f"model.layers.{module}_{end}.{part}" in written


def test_plain_experts_leave_nothing_packed(source, tmp_path):
    """transformers reads no folder whose experts alone are plain."""
    report = convert_checkpoint(
        source, tmp_path / "out", to="safetensors", quantize=QuantRules(attention=INT4, head=INT8), method="rtn"
    )
    assert not [name for name in hf_checkpoints.read_tensors(tmp_path / "out") if name.endswith("weight_packed")]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "beside plain experts, where transformers reads no packed weights" in report.notes[-1]


def test_notes_on_who_reads_a_folder(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "experts", to="safetensors", quantize=rules(POINT4), method="rtn")
    assert "the experts have zero points: serving engines read these, transformers does not" in report.notes
    report = convert_checkpoint(
        source, tmp_path / "dense", to="safetensors", quantize=rules(POINT4, experts=INT4), method="rtn"
    )
    assert "dequantize=True" in report.notes[-1]


def test_plain_values_have_the_models_dtype(source, tmp_path):
    """The dtype of config.json, and not that of scales or of the source's other weights, unless asked for."""
    config = {**original_config(**quantized_checkpoints.QUANTIZABLE_SIZES), "dtype": "bfloat16"}
    folder = hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.read_tensors(source))
    for dtype, expected in ((None, ml_dtypes.bfloat16), ("float32", np.float32)):
        out = tmp_path / str(dtype)
        floats = rules(INT8, experts=INT4, attention=QuantSpec(kind="fp8", block=(1, 0)))
        report = convert_checkpoint(folder, out, to="safetensors", quantize=floats, method="rtn", dtype=dtype)
        words = "rounded to bfloat16" if dtype is None else "in float32"
        assert words in report.notes[-1]
        tensors = hf_checkpoints.read_tensors(out)
        assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == expected
        assert json.loads((out / "config.json").read_text())["dtype"] == np.dtype(expected).name


def test_tied_head_is_plain_and_copies_follow_their_originals(tmp_path):
    for tied in (False, True):
        config = original_config(**{**quantized_checkpoints.QUANTIZABLE_SIZES, "tie_word_embeddings": tied})
        folder = hf_checkpoints.write_checkpoint(tmp_path / f"{tied}", config, hf_checkpoints.random_tensors(config, 4))
        convert_checkpoint(folder, tmp_path / f"out {tied}", to="safetensors", quantize="int8", method="rtn")
        names = hf_checkpoints.read_tensors(tmp_path / f"out {tied}")
        assert ("model.layers.2.shared_head.head.weight" in names) == tied
        assert ("model.layers.2.shared_head.head.weight_packed" in names) == ("lm_head.weight_packed" in names) != tied
        assert "model.layers.2.embed_tokens.weight" in names
        said = json.loads((tmp_path / f"out {tied}" / "config.json").read_text())["quantization_config"]
        assert ("lm_head" in said["ignore"]) == tied
        assert open_source(tmp_path / f"out {tied}").cfg.mtp_own_embeddings is False


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QuantSpec(kind="fp8", block=(128, 128)), "small floats"),
        (QuantSpec(kind="fp4", block=(1, 32), scale="e8m0"), "small floats"),
        (QuantSpec(kind="int4", block=(1, 64), zero="bias"), "biases"),
        (QuantSpec(kind="int8", block=(32, 1)), "several outputs"),
        (QuantSpec(kind="int8", block=(0, 0)), "several outputs"),
        (QuantSpec(kind="int4", block=(1, 48)), "cut off"),
        (QuantSpec(kind="int4", block=(1, 32), permuted=True), "activation order"),
        (QuantSpec(kind="int4", block=(1, 0), permuted=True), None),
        (QuantSpec(kind="int8", block=(1, 64), zero="point"), None),
    ],
)
def test_what_a_linear_module_cannot_hold(spec, words):
    reason = pack_unsupported_reason(spec, (64, 128))
    assert (reason is None) == (words is None)
    assert words is None or words in reason


def test_description_of_the_real_model():
    """A pattern for each kind of module, not a line for each of nine thousand."""
    cfg = Config.flash()
    layers, mtp = cfg.num_hidden_layers, cfg.num_hidden_layers
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj": INT4
        for layer in range(1, layers + 1)
        for expert in range(cfg.n_routed_experts)
        for part in ("gate", "up", "down")
    }
    heads = {"lm_head": INT8, f"model.layers.{mtp}.shared_head.head": INT8}
    said = build_quantization_config(
        experts | heads, [f"model.layers.{layer}.mlp.gate" for layer in range(1, layers + 1)]
    )
    (first,), second = said["config_groups"]["group_0"]["targets"], said["config_groups"]["group_1"]["targets"]
    assert len(first) < 300
    assert matches(first, "model.layers.47.mlp.experts.63.down_proj")
    assert not matches(first, "model.layers.0.mlp.experts.1.down_proj")
    assert not matches(first, "model.layers.1.mlp.shared_experts.down_proj")
    assert any(matches(target, "model.layers.47.head") for target in second)  # what vLLM calls it
    assert len(said["ignore"]) == 1
    assert matches(said["ignore"][0], "model.layers.9.mlp.gate")
    assert not matches(said["ignore"][0], "model.layers.9.mlp.gate_proj")
