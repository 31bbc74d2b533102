"""Errors in quantized checkpoints are reported once, by module name, and as early as possible."""

import ml_dtypes
import numpy as np
import pytest

from glm_jax.checkpoint.formats import read_stored_weights
from glm_jax.checkpoint.safetensors.reader import SafetensorsReader
from glm_jax.errors import CheckpointError
from tests.checkpoint.formats import golden_cases


def changed(case, drop=(), **parts):
    return {key: value for key, value in {**case.tensors, **parts}.items() if key not in drop}


def weights(case, **settings):
    """A compressed-tensors configuration with other weight settings."""
    group = case.config["config_groups"]["group_0"]
    return case.config | {"config_groups": {"group_0": group | {"weights": group["weights"] | settings}}}


def refused(folder, message, parts, config, exported=None, *, loading=False):
    """Checks that opening, or only loading, raises an error with the module's name and this message."""
    if loading:
        stored = golden_cases.read_weight(folder, parts, config, exported)
        with pytest.raises(CheckpointError, match=message) as caught:
            stored.load(None)
    else:
        with pytest.raises(CheckpointError, match=message) as caught:
            golden_cases.read_weight(folder, parts, config, exported)
    assert str(caught.value).startswith(f"{golden_cases.MODULE_NAME}: ")


ASYM, SYM = (
    golden_cases.get_case("compressed_tensors", "asym-g32"),
    golden_cases.get_case("compressed_tensors", "sym-g32"),
)


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        (SYM, {"num_bits": 8}, "the configuration says 8-bit integers, but 64 inputs are packed into 8 words"),
        (SYM, {"type": "float"}, "the configuration says 4-bit floats, but 64 inputs are packed into 8 words"),
        (SYM, {"group_size": 64}, "the configuration says 4-bit integers, but 128 inputs are packed into 8 words"),
        (SYM, {"strategy": "channel"}, "the configuration says one scale for all inputs, but 64 inputs have 2 scales"),
        (SYM, {"symmetric": False}, "the configuration says asymmetric, but weight_zero_point is missing"),
        (ASYM, {"symmetric": True}, "the configuration says symmetric, but there is a weight_zero_point"),
    ],
)
def test_configurations_that_contradict_compressed_tensors(tmp_path, case, settings, message):
    refused(tmp_path, message, case.tensors, weights(case, **settings))


def test_configurations_that_say_nothing_usable(tmp_path):
    for i, (settings, message) in enumerate(
        [
            ({"num_bits": "four"}, "num_bits in the quantization's configuration must be a whole number, not 'four'"),
            ({"symmetric": 1}, "symmetric in the quantization's configuration must be true or false, not 1"),
            ({"strategy": "block", "block_structure": [128]}, r"must be two sizes, not \[128\]"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            golden_cases.read_weight(tmp_path / str(i), SYM.tensors, weights(SYM, **settings))
    for section, message in (
        (3, "quantization_config in config.json must be an object, not 3"),
        (SYM.config | {"config_groups": [1]}, "config_groups must be an object"),
        (SYM.config | {"config_groups": {"g": {"targets": 1}}}, "targets .* must be a list, not 1"),
        (
            SYM.config | {"config_groups": {"g": {"targets": ["re:("]}}},
            r"the pattern \( in the config",
        ),
        ({"quant_method": "gptq", "dynamic": 3}, "extra_config and dynamic must be objects"),
    ):
        golden_cases.write_module_checkpoint(
            tmp_path, {f"{golden_cases.MODULE_NAME}.{part}": array for part, array in SYM.tensors.items()}
        )
        with pytest.raises(CheckpointError, match=message):
            read_stored_weights(SafetensorsReader.open(tmp_path), {"quantization_config": section}, tmp_path)


@pytest.mark.parametrize(
    ("drop", "parts", "message"),
    [
        (["weight_scale"], {}, "weight_scale is missing beside weight_packed, weight_shape, weight_zero_point"),
        (["weight_packed"], {}, "weight_scale, weight_shape, weight_zero_point without the weight that it belongs to"),
        ([], {"weight_scale": np.ones((9, 2), np.int32)}, "weight_scale has dtype I32, expected F32 or BF16 or F16"),
        ([], {"weight_scale": np.ones((8, 2), np.float32)}, r"weight_scale has shape \[8, 2\], expected \[9, 2\]"),
        ([], {"weight_packed": np.ones((9, 7), np.int32)}, "64 inputs are packed into 7 words"),
        ([], {"weight_packed": np.ones((9, 8), np.int64)}, "weight_packed has dtype I64, expected I32"),
        ([], {"weight_packed": np.ones(8, np.int32)}, r"weight_packed has shape \[8\], expected 2 or 3 dimensions"),
        ([], {"weight_packed": np.ones((0, 8), np.int32)}, "weight_packed is empty"),
        ([], {"weight_zero_point": np.ones((9, 2), np.int32)}, r"weight_zero_point has shape .*, expected \[2, 2\]"),
        ([], {"weight_zero_point": np.ones((2, 2), np.int8)}, "weight_zero_point has dtype I8, expected I32"),
        ([], {"weight_g_idx": np.zeros(63, np.int32)}, r"weight_g_idx has shape \[63\], expected \[64\]"),
        ([], {"weight_shape": np.array([9, 64, 1])}, r"weight_shape has shape \[3\], expected \[2\]"),
        (
            [],
            {"biases": np.ones(3, np.float32)},
            "biases beside weight_packed, .*: the checkpoint is damaged or",
        ),
        ([], {"weight": np.ones(3, np.float32)}, "weight beside weight_packed"),
    ],
)
def test_tensors_of_compressed_tensors(tmp_path, drop, parts, message):
    refused(tmp_path, message, changed(ASYM, drop, **parts), ASYM.config)


def test_shapes_without_a_configuration(tmp_path):
    refused(tmp_path / "0", "weight_shape is missing beside", changed(SYM, ["weight_shape"]), None)
    wide = changed(SYM, weight_shape=np.array([5, 1000]))
    refused(tmp_path / "1", "weight_shape says 1000 inputs, which do not fit 8 words", wide, None)
    odd = changed(SYM, weight_shape=np.array([5, 63]))
    refused(tmp_path / "2", "2 scales do not divide 63 inputs", odd, None)


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("weight_shape", np.array([9, 63]), r"weight_shape says \[9, 63\], but the other tensors make \[9, 64\]"),
        ("weight_scale", np.full((9, 2), np.nan, np.float16), "weight_scale holds values that are not finite"),
        ("weight_scale", np.full((9, 2), np.inf, ml_dtypes.bfloat16), "weight_scale holds values that are not finite"),
        ("weight_scale", np.zeros((9, 2), np.float32), "weight_scale holds zeros, which no quantizer writes"),
        ("weight_g_idx", np.full(64, 2, np.int32), r"weight_g_idx names groups outside 0 \.\. 1: the file is damaged"),
        ("weight_g_idx", np.full(64, -1, np.int32), r"weight_g_idx names groups outside 0 \.\. 1: the file is damaged"),
    ],
)
def test_values_are_checked_when_they_are_loaded(tmp_path, part, array, message):
    refused(tmp_path, message, changed(ASYM, **{part: array}), ASYM.config, loading=True)


GPTQ = golden_cases.get_case("gptq", "v1-sym")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 8}, "the configuration says 8 bits, but qweight has 8 rows and qzeros 1 columns for 8 outputs"),
        ({"group_size": 64}, "the configuration says groups of 64, but 64 inputs have 2 scales"),
        ({"group_size": -1}, "the configuration says groups of 0, but 64 inputs have 2 scales"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format gptq_p is not read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin is not read"),
        ({"quant_method": "awq"}, "the configuration describes awq, but the tensors are GPTQ's"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "packing_format .*awq is not read"),
    ],
)
def test_configurations_that_contradict_gptq(tmp_path, config, message):
    refused(tmp_path, message, GPTQ.tensors, GPTQ.config | config)


def test_gptq_needs_a_configuration(tmp_path):
    refused(tmp_path, "the configuration describes no quantization, but the tensors are GPTQ's", GPTQ.tensors, None)


@pytest.mark.parametrize(
    ("drop", "parts", "message"),
    [
        (["qweight"], {}, "g_idx, qzeros, scales without the weight that it belongs to"),
        (["scales"], {}, "scales is missing beside g_idx, qweight, qzeros"),
        (["qzeros"], {}, "qzeros is missing beside g_idx, qweight, scales"),
        ([], {"scales": np.ones((2, 8), np.int32)}, "scales has dtype I32"),
        ([], {"qweight": np.ones((8, 8), np.int64)}, "qweight has dtype I64, expected I32"),
        ([], {"qweight": np.ones((7, 8), np.int32)}, "qweight has 7 rows"),
        ([], {"qzeros": np.ones((3, 1), np.int32)}, r"qzeros has shape \[3, 1\], expected \[2, 1\]"),
        ([], {"g_idx": np.zeros(56, np.int32)}, "qweight has 8 rows"),
        ([], {"g_idx": np.zeros((64, 1), np.int32)}, "expected 1 dimensions"),
        ([], {"weight_scale": np.ones(3, np.float32)}, "weight_scale beside"),
    ],
)
def test_tensors_of_gptq(tmp_path, drop, parts, message):
    refused(tmp_path, message, changed(GPTQ, drop, **parts), GPTQ.config)


def test_values_of_gptq(tmp_path):
    def loading(name, message, config=None, **parts):
        refused(tmp_path / name, message, changed(GPTQ, **parts), GPTQ.config | (config or {}), loading=True)

    loading("zeros", "says symmetric, but not all zero points are 8", qzeros=np.full((2, 1), 0x77777776, np.int32))
    turned = np.arange(64, dtype=np.int32) % 2
    loading("order", "g_idx reorders the inputs, but the configuration says desc_act is false", g_idx=turned)
    loading("range", r"g_idx names groups outside 0 \.\. 1", g_idx=np.full(64, 5, np.int32))
    loading("range2", r"g_idx names groups outside 0 \.\. 1", {"desc_act": True}, g_idx=np.full(64, 5, np.int32))
    loading("scales", "scales holds values that are not finite", scales=np.full((2, 8), np.inf, np.float16))


def test_planes_are_not_streams(tmp_path):
    case = golden_cases.get_case("autoround", "gptq-int5")
    config = {"quant_method": "gptq", "bits": 5, "group_size": 32, "sym": False}
    refused(tmp_path, "5-bit GPTQ is packed in planes, which is not read", case.tensors, config)


AWQ = golden_cases.get_case("awq", "g32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "gemv"}, r"AWQ's layout gemv is not read \(known is gemm\)"),
        ({"version": None, "checkpoint_format": "marlin"}, "AWQ's layout marlin is not read"),
        ({"bits": 8}, "32 outputs of 8 bits are not packed into 4 words"),
        ({"group_size": 16}, "the configuration says blocks of 16 inputs, but 64 inputs have 2 scales"),
        ({"quant_method": "gptq"}, "the configuration describes gptq, but the tensors are AWQ's"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "AWQ's layout auto_round is not read"),
    ],
)
def test_configurations_that_contradict_awq(tmp_path, config, message):
    refused(tmp_path, message, AWQ.tensors, AWQ.config | config)


def test_tensors_of_awq(tmp_path):
    refused(tmp_path / "0", "qzeros is missing beside qweight, scales", changed(AWQ, ["qzeros"]), AWQ.config)
    indexed = changed(AWQ, g_idx=np.zeros(64, np.int32))
    refused(tmp_path / "1", "g_idx beside qweight, qzeros, scales", indexed, AWQ.config)
    said = AWQ.config | {"sym": True}
    refused(tmp_path / "2", "symmetric, but not all zero points are 8", AWQ.tensors, said, loading=True)


CHANNEL, BLOCK = golden_cases.get_case("fp8", "channel"), golden_cases.get_case("fp8", "inverse")


@pytest.mark.parametrize(
    ("case", "config", "parts", "message"),
    [
        (BLOCK, {"weight_block_size": [16, 16]}, {}, "says blocks of 16 outputs, but 16 outputs have 2 scales"),
        (BLOCK, {"weight_block_size": [8, 0]}, {}, "must be two sizes"),
        (BLOCK, {}, {"weight_scale_inv": np.ones((2, 4), np.float32)}, "blocks of 16 inputs, but 48 inputs have 4"),
        (
            BLOCK,
            {},
            {"weight_scale_inv": np.ones(5, np.float32)},
            r"weight_scale_inv has shape \[5\], which does not",
        ),
        (BLOCK, {}, {"weight": np.ones((16, 48), ml_dtypes.float8_e5m2)}, "weight has dtype F8_E5M2, expected F8_E4M3"),
        (BLOCK, {}, {"weight": np.ones((16, 48), ml_dtypes.bfloat16)}, "weight has dtype BF16"),
        (BLOCK, {}, {"weight": np.ones(16, ml_dtypes.float8_e4m3fn)}, "expected 2 or 3 dimensions"),
        (CHANNEL, {}, {"weight_scale": np.ones((8, 1), np.int8)}, "weight_scale has dtype I8"),
        (CHANNEL, {}, {"weight_scale": np.ones(1, np.float32)}, "says one scale per output, but there is one for all"),
        (CHANNEL, {}, {"weight_scale": np.ones((8, 5), np.float32)}, "one scale for all inputs, but 48 inputs have 5"),
        (CHANNEL, {}, {"weight_scale_2": np.ones((), np.float32)}, "weight_scale_2 beside weight, weight_scale"),
    ],
)
def test_tensors_of_fp8(tmp_path, case, config, parts, message):
    if "two sizes" in message:
        with pytest.raises(CheckpointError, match=message):
            golden_cases.read_weight(tmp_path, changed(case, **parts), case.config | config)
        return
    refused(tmp_path, message, changed(case, **parts), case.config | config)


def test_scales_and_weights_of_fp8_lose_each_other(tmp_path):
    refused(tmp_path / "0", "weight_scale without the weight", changed(CHANNEL, ["weight"]), CHANNEL.config)
    alone = golden_cases.read_weight(tmp_path / "1", changed(CHANNEL, ["weight_scale"]), CHANNEL.config)
    assert (alone.spec, alone.dtype) == (None, ml_dtypes.float8_e4m3fn)  # the rules refuse tensors of this dtype
    refused(tmp_path / "2", "says 4-bit integers, but weight is float8", CHANNEL.tensors, SYM.config)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_fp8_weights_that_are_not_numbers(tmp_path, bits):
    codes = np.array(CHANNEL.tensors["weight"]).view(np.uint8)
    codes[3, 5] = bits
    parts = changed(CHANNEL, weight=codes.view(ml_dtypes.float8_e4m3fn))
    refused(tmp_path, "weight holds values that are not numbers", parts, CHANNEL.config, loading=True)


NVFP4, MXFP4, MODELOPT = (golden_cases.get_case("fp4", name) for name in ("nvfp4", "mxfp4", "modelopt"))


@pytest.mark.parametrize(
    ("case", "drop", "parts", "message"),
    [
        (NVFP4, ["weight_global_scale"], {}, "weight_global_scale is missing"),
        (NVFP4, ["weight_scale"], {}, "weight_scale is missing"),
        (NVFP4, [], {"weight_global_scale": np.ones(2, np.float32)}, "weight_global_scale has shape"),
        (NVFP4, [], {"weight_global_scale": np.ones(1, np.float16)}, "weight_global_scale has dtype F16, expected F32"),
        (NVFP4, [], {"weight_scale": np.ones((16, 4), np.float16)}, "weight_scale has dtype F16"),
        (NVFP4, [], {"weight_scale": np.ones((16, 5), np.uint8)}, "blocks of 16 inputs, but 64 inputs have 5 scales"),
        (NVFP4, [], {"weight_zero_point": np.ones((16, 4), np.int8)}, "weight_zero_point beside weight_global_scale"),
        (MXFP4, [], {"weight_global_scale": np.ones(1, np.float32)}, "does not go with scales that are powers of two"),
        (MODELOPT, ["weight_scale_2"], {}, "weight_scale_2 is missing beside weight, weight_scale"),
        (MODELOPT, [], {"weight_scale": np.ones((16, 4), np.float32)}, "weight_scale has dtype F32"),
        (MODELOPT, [], {"weight": np.ones((16, 31), np.uint8)}, "62 inputs have 4 scales"),
    ],
)
def test_tensors_of_fp4(tmp_path, case, drop, parts, message):
    refused(tmp_path, message, changed(case, drop, **parts), case.config)


def test_values_of_fp4(tmp_path):
    nan = np.full((16, 4), 0x7F, np.uint8).view(ml_dtypes.float8_e4m3fn)
    refused(tmp_path / "0", "not numbers", changed(NVFP4, weight_scale=nan), NVFP4.config, loading=True)
    top = np.full((16, 2), 255, np.uint8)
    refused(tmp_path / "1", "not numbers", changed(MXFP4, weight_scale=top), MXFP4.config, loading=True)
    for i, value in enumerate((0, -1, np.nan, np.inf)):
        parts = changed(NVFP4, weight_global_scale=np.full(1, value, np.float32))
        refused(tmp_path / f"g{i}", "weight_global_scale must be positive", parts, NVFP4.config, loading=True)


def test_integers_that_modelopt_packs_otherwise(tmp_path):
    config = {"quant_method": "modelopt", "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}}
    refused(tmp_path, "weight holds bytes, which for the configuration's 8-bit integers", MODELOPT.tensors, config)


MLX = golden_cases.get_case("mlx", "int4-g64")


@pytest.mark.parametrize(
    ("drop", "parts", "config", "message"),
    [
        ([], {}, {"bits": 8}, "says 8 bits in groups of 64, but 16 words have 2 scales"),
        ([], {}, {"group_size": 32}, "says 4 bits in groups of 32, but 16 words have 2 scales"),
        ([], {}, {"mode": "ternary"}, "MLX's mode ternary with 4 bits is not read"),
        ([], {}, {golden_cases.MODULE_NAME: {"bits": 3}}, "says 3 bits in groups of 64"),
        (["biases"], {}, {}, "biases is missing beside scales, weight"),
        (["scales"], {}, {}, "scales is missing beside biases, weight"),
        (["weight"], {}, {}, "biases, scales without the weight"),
        ([], {"biases": np.ones((5, 2), np.float32)}, {}, "biases has another dtype than scales"),
        ([], {"biases": np.ones((5, 1), ml_dtypes.bfloat16)}, {}, r"biases has shape \[5, 1\], expected \[5, 2\]"),
        ([], {"scales": np.ones((4, 2), np.float32)}, {}, r"scales has shape \[4, 2\] and weight \[5, 16\]"),
        ([], {"scales": np.ones((5, 2), np.uint8)}, {}, "scales has dtype U8"),
        ([], {"qzeros": np.ones((5, 2), np.int32)}, {}, "qzeros beside"),
    ],
)
def test_tensors_of_mlx(tmp_path, drop, parts, config, message):
    refused(tmp_path, message, changed(MLX, drop, **parts), MLX.config | config)


def test_mlx_without_its_configuration(tmp_path):
    refused(tmp_path / "0", "MLX's tensors need bits and group_size", MLX.tensors, None)
    other = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    refused(tmp_path / "1", "the configuration describes gptq, but the tensors are MLX's", MLX.tensors, other)
    biased = changed(golden_cases.get_case("mlx", "mxfp4"), biases=np.ones((8, 2), np.float32))
    message = "there are biases, which the mode mxfp4 does not have"
    refused(tmp_path / "2", message, biased, {"bits": 4, "group_size": 32, "mode": "mxfp4"})
    wrong = golden_cases.get_case("mlx", "mxfp8").tensors
    refused(tmp_path / "3", "mode mxfp4 with 8 bits", wrong, {"bits": 8, "group_size": 32, "mode": "mxfp4"})


def test_values_of_mlx(tmp_path):
    for part in ("scales", "biases"):
        broken = changed(MLX, **{part: np.full((5, 2), np.nan, ml_dtypes.bfloat16)})
        refused(tmp_path / part, f"{part} holds values that are not finite", broken, MLX.config, loading=True)


def test_a_file_of_modelopt_that_is_broken(tmp_path):
    for text, message in (("{", "hf_quant_config.json is not valid JSON"), ("[]", "has no object called quantization")):
        golden_cases.write_module_checkpoint(tmp_path, {"w": np.ones(3, np.float32)})
        (tmp_path / "hf_quant_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_stored_weights(SafetensorsReader.open(tmp_path), {}, tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "exl3"}, "EXL3"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"quant_method": "mxfp4"}, "MXFP4 of gpt-oss"),
        ({"quant_method": "fbgemm_fp8"}, "FBGEMM FP8"),
        ({"quant_method": "new\nmethod"}, r"unknown quant_method new\\nmethod"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "compressed-tensors, marlin-24"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "mxfp6-pack-quantized"}}},
            "compressed-tensors, mxfp6-pack-quantized",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors, sparse-24-bitmask",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
            "compressed-tensors with transf",
        ),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "gptq with rotation"),
    ],
)
def test_methods_that_nothing_reads(tmp_path, config, words):
    with pytest.raises(CheckpointError, match=rf"this checkpoint is quantized \({words}\S*\), which is not read"):
        golden_cases.read_weights(tmp_path, SYM.tensors, config)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weight.absmax", "bitsandbytes"),
        ("W_q", "HQQ"),
        ("trellis", "EXL3"),
        ("q_invperm", "EXL2"),
        ("weight._data", "quanto"),
        ("codebooks", "AQLM"),
        ("bitmask", "sparse compressed-tensors"),
        ("pre_quant_scale", "ModelOpt with scaled inputs .AWQ."),
        ("gate_up_proj_blocks", "MXFP4 of gpt-oss"),
    ],
)
def test_tensors_that_nothing_reads(tmp_path, name, words):
    with pytest.raises(CheckpointError, match=rf"this checkpoint is quantized \({words}\), which is not read"):
        golden_cases.read_weights(tmp_path, {f"{golden_cases.MODULE_NAME}.{name}": np.ones(3, np.float32)})
