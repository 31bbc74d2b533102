"""Opening reads headers only, and the quantization configurations of all writers are understood."""

import numpy as np
import pytest

from glm_jax.checkpoint.formats import read_stored_weights
from glm_jax.checkpoint.formats.quantization_config import DeclaredScheme, QuantizationConfig
from glm_jax.checkpoint.safetensors.reader import SafetensorsReader
from glm_jax.errors import CheckpointError
from tests.checkpoint.formats import golden_cases


class RecordingReader:
    """A reader that records the suffixes of the tensors that are read."""

    def __init__(self, reader):
        self.reader, self.read = reader, []

    def __iter__(self):
        return iter(self.reader)

    def tensor_info(self, name):
        return self.reader.tensor_info(name)

    def get_tensor(self, name):
        self.read.append(name.rpartition(".")[2])
        return self.reader.get_tensor(name)


FILES = ("compressed_tensors", "compressed_tensors_actorder", "gptq", "autoround", "awq", "fp8", "fp4", "mlx")


@pytest.mark.parametrize("file", FILES)
def test_opening_reads_no_weights(tmp_path, file):
    for case in golden_cases.load_cases(file):
        folder = tmp_path / case.name
        section = golden_cases.write_module_checkpoint(
            folder, {f"{golden_cases.MODULE_NAME}.{k}": v for k, v in case.tensors.items()}, case.config
        )
        reader = RecordingReader(SafetensorsReader.open(folder))
        weights = read_stored_weights(reader, section, folder)
        # The shape, if nothing else tells how much of the last word is padding; the group index, if groups may have
        # different sizes.
        expected = ["weight_shape"] if case.name.endswith("-channel") and file == "compressed_tensors" else []
        expected += ["g_idx"] if case.config.get("desc_act") else []
        expected += ["weight_g_idx"] if "actorder" in file else []
        assert reader.read == expected
        weights[f"{golden_cases.MODULE_NAME}.weight"].load(None)
        assert len(reader.read) > len(expected)


def test_every_module_is_read_in_its_own_format(tmp_path):
    """A compressed-tensors checkpoint with 4 and 8 bits, floats, and unquantized modules."""
    parts = {
        "a": ("compressed_tensors", "sym-g32"),
        "b": ("compressed_tensors", "int8-asym-g64"),
        "c": ("fp8", "channel"),
        "d": ("fp4", "nvfp4"),
    }
    tensors, groups = {"model.e.weight": np.ones((2, 3), np.float32)}, {}
    for i, (name, (file, case)) in enumerate(parts.items()):
        found = golden_cases.get_case(file, case)
        tensors |= {f"model.{name}.proj.{part}": array for part, array in found.tensors.items()}
        group = found.config["config_groups"]["group_0"]
        groups[f"group_{i}"] = group | {"targets": [f"re:.*{name}\\.proj" if i % 2 else f"model.{name}.proj"]}
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    config["ignore"] = ["model.a.proj", "lm_head"]  # wrong on purpose, because such lists often are
    found = golden_cases.read_weights(tmp_path, tensors, config)
    kinds = {name: None if stored.spec is None else stored.spec.kind for name, stored in found.items()}
    expected = {f"model.{n}.proj.weight": kind for n, kind in zip("abcd", ("int4", "int8", "fp8", "fp4"), strict=True)}
    assert kinds == {"model.e.weight": None} | expected
    for name, (file, case) in parts.items():
        values = np.asarray(found[f"model.{name}.proj.weight"].load(None))
        assert golden_cases.values_sha256(values) == golden_cases.get_case(file, case).sha256


def test_the_kind_of_a_class_counts_where_no_name_does(tmp_path):
    groups = {
        "named": {"targets": ["re:.*other"], "weights": {"num_bits": 8, "group_size": 64}},
        "all": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    quant_config = QuantizationConfig.from_config({"compression_config": config}, tmp_path)
    assert quant_config.scheme_for("model.proj") == DeclaredScheme(bits=4, block=(1, 32), kind="int")
    assert quant_config.scheme_for("model.other").bits == 8
    groups["more"] = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    assert quant_config.scheme_for("model.proj") == DeclaredScheme()  # the tensors must tell
    groups["more"] = {"targets": ["Embedding"], "weights": groups["all"]["weights"]}
    assert quant_config.scheme_for("model.proj").bits == 4


@pytest.mark.parametrize(
    ("weights", "block"),
    [
        ({"strategy": "channel"}, (1, 0)),
        ({"strategy": "channel", "group_size": -1}, (1, 0)),
        ({"strategy": "tensor"}, (0, 0)),
        ({"strategy": "block", "block_structure": [128, 64]}, (128, 64)),
        ({"strategy": "block", "block_structure": "128x64"}, (128, 64)),
        ({"group_size": 16}, (1, 16)),
        ({"group_size": -1}, (1, 0)),
        ({}, None),
    ],
)
def test_blocks_of_compressed_tensors(tmp_path, weights, block):
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    assert QuantizationConfig.from_config({"quantization_config": config}, tmp_path).scheme_for("x").block == block


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"bits": 4, "group_size": 128, "sym": True}, "m.a", DeclaredScheme(4, (1, 128), True, kind="int")),
        ({"bits": 4, "group_size": -1, "desc_act": True}, "m.a", DeclaredScheme(4, (1, 0), None, True, "int")),
        ({"w_bit": 4, "q_group_size": 64}, "m.a", DeclaredScheme(4, (1, 64), kind="int")),
        ({"bits": 4, "extra_config": {"m.a": {"bits": 8}}}, "m.a", DeclaredScheme(8, kind="int")),
        ({"bits": 4, "extra_config": {"m.a": {"bits": 16}}}, "m.a", DeclaredScheme()),
        ({"bits": 4, "extra_config": {"m.a": {"bits": 8}}}, "m.b", DeclaredScheme(4, kind="int")),
        ({"bits": 4, "extra_config": {".*a$": {"bits": 8}, "x": {}}}, "m.a", DeclaredScheme(8, kind="int")),
        ({"bits": 4, "extra_config": {"m.": {"bits": 8}}}, "mm.a", DeclaredScheme(8, kind="int")),
        ({"bits": 4, "extra_config": {"m.": {"bits": 8}}}, "mxa", DeclaredScheme(4, kind="int")),
        ({"bits": 4, "dynamic": {"-:.*a": {}, r"+:m\..": {"bits": 3}}}, "m.a", DeclaredScheme(3, kind="int")),
        ({"bits": 4, "dynamic": {r"m\.b": {"group_size": 32}}}, "m.b", DeclaredScheme(4, (1, 32), kind="int")),
        ({}, "m.a", DeclaredScheme()),
    ],
)
@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round", "auto_round", "intel/auto-round"])
def test_settings_of_integers(tmp_path, config, module, expected, method):
    section = {"quantization_config": {"quant_method": method, **config}}
    assert QuantizationConfig.from_config(section, tmp_path).scheme_for(module) == expected


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_settings_of_mlx(tmp_path, key):
    said = {"bits": 4, "group_size": 64, "m.a": {"bits": 8, "group_size": 32}, "m.b": False, "m.c": True}
    quant_config = QuantizationConfig.from_config({key: said}, tmp_path)
    assert quant_config.quant_method == "mlx"
    assert quant_config.scheme_for("m.a") == DeclaredScheme(8, (1, 32), mode="affine")
    for module in ("m.b", "m.c", "m.d"):
        assert quant_config.scheme_for(module) == DeclaredScheme(4, (1, 64), mode="affine")


def test_settings_of_modelopt(tmp_path):
    def declared(module, **section):
        golden_cases.write_module_checkpoint(
            tmp_path, {"w": np.ones(1, np.float32)}, hf_quant_config={"quantization": section}
        )
        quant_config = QuantizationConfig.from_config({}, tmp_path)
        assert quant_config.quant_method == "modelopt"
        return quant_config.scheme_for(module)

    assert declared("m.a", quant_algo="NVFP4", group_size=16) == DeclaredScheme(4, (1, 16), kind="float")
    assert declared("m.a", quant_algo="FP8") == DeclaredScheme(8, kind="float")
    assert declared("m.a", quant_algo="FP8_PB_WO") == DeclaredScheme(8, kind="float")
    layers = {"m.a": {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32}, "m.b": {"quant_algo": "FP8"}}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert declared("m.a", **mixed) == DeclaredScheme(4, (1, 32), kind="float")
    assert declared("m.b", **mixed) == DeclaredScheme(8, kind="float")
    assert declared("m.c", **mixed) == DeclaredScheme()


def test_settings_of_fp8(tmp_path):
    for method, block in (({"weight_block_size": [128, 128]}, (128, 128)), ({}, None)):
        quant_config = QuantizationConfig.from_config(
            {"quantization_config": {"quant_method": "fp8", **method}}, tmp_path
        )
        assert quant_config.scheme_for("m.a") == DeclaredScheme(8, block, kind="float")


@pytest.mark.parametrize(
    ("said", "packing"),
    [
        (None, "auto_round:auto_gptq"),
        ("auto", "auto_round:auto_gptq"),
        ("auto_round:gptq", "auto_round:auto_gptq"),
        ("auto_round:awq", "auto_round:auto_awq"),
        ("auto_round", "auto_round"),
        ("auto_round:gptqmodel", "auto_round:gptqmodel"),
    ],
)
def test_packing_formats_of_autoround(said, packing):
    assert QuantizationConfig("auto-round", {} if said is None else {"packing_format": said}).packing_format == packing


def test_plain_autogptq_and_autoround_files_agree(tmp_path):
    """Read as zero points minus one or as they are, the same words give zero points that differ by one."""
    case = golden_cases.get_case("autoround", "plain-asym")
    plain = golden_cases.read_weight(tmp_path / "a", case.tensors, case.config).load(None)
    minus_one = golden_cases.read_weight(
        tmp_path / "b", case.tensors, case.config | {"packing_format": "auto_round:auto_gptq"}
    ).load(None)
    np.testing.assert_array_equal(plain.codes, minus_one.codes)
    np.testing.assert_array_equal(plain.zeros + 1, minus_one.zeros)


def test_int8_weights_of_compressed_tensors(tmp_path):
    rng = np.random.default_rng(5)
    codes = rng.integers(-128, 128, (6, 8)).astype(np.int8)
    scales, zeros = rng.uniform(1, 2, (6, 1)).astype(np.float16), rng.integers(-128, 128, (6, 1)).astype(np.int8)
    stored = golden_cases.read_weight(tmp_path / "0", {"weight": codes, "weight_scale": scales})
    assert (stored.spec.kind, stored.spec.zero, stored.spec.block) == ("int8", "none", (1, 0))
    np.testing.assert_array_equal(np.asarray(stored.load(None)), codes.astype(np.float32) * scales.astype(np.float32))
    parts = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros}
    stored = golden_cases.read_weight(tmp_path / "1", parts)
    assert stored.spec.zero == "point"
    values = (codes.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(stored.load(None)), values)


def test_patterns_have_an_end(tmp_path):
    config = {"quant_method": "gptq", "bits": 4, "dynamic": {"a" * 2000: {}}}
    with pytest.raises(CheckpointError, match="in the configuration is broken"):
        QuantizationConfig.from_config({"quantization_config": config}, tmp_path)
