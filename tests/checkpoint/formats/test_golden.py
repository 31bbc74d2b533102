"""Every format against files from its own library: integers, zero points, scales and values agree bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from glm_jax.weights import QuantizedTensor, QuantSpec, dequantize, unpack_nibbles
from tests.checkpoint.formats import golden_cases


def unsigned(tensor, bits):
    """Unsigned codes as the file has them, with columns in the order of the inputs."""
    spec = tensor.spec
    codes = unpack_nibbles(tensor.codes) if spec.kind == "int4" else tensor.codes
    if spec.zero == "none":
        # The tensor centers codes on 8 in a nibble and on 0 in a byte, the file on 2^(bits - 1).
        codes = codes.astype(np.int16) + (1 << (bits - 1)) - (8 if spec.kind == "int4" else 0)
    if tensor.permutation is not None:
        codes = np.take_along_axis(codes, np.broadcast_to(np.argsort(tensor.permutation), codes.shape), -1)
    return codes


def check_integers(case, stored, bits):
    tensor = stored.load(None)
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.shape == stored.shape == case.shape
    assert tensor.spec == stored.spec
    assert stored.dtype == case.scales.dtype
    np.testing.assert_array_equal(unsigned(tensor, bits), case.codes)
    np.testing.assert_array_equal(golden_cases.bit_patterns(tensor.scales), golden_cases.bit_patterns(case.scales))
    assert tensor.scales.dtype == case.scales.dtype
    if tensor.spec.zero == "none":
        assert (case.zeros == 1 << (bits - 1)).all()
    else:
        np.testing.assert_array_equal(tensor.zeros, case.zeros)
    check_values(case, tensor)
    shapes = {name: (array.shape, array.dtype) for name, array in tensor.components().items()}
    assert shapes == tensor.spec.component_shapes(case.shape)


def check_values(case, tensor):
    values = dequantize(tensor)
    if case.library is not None:
        # Libraries round the exact product once, to the dtype of the scales.
        np.testing.assert_array_equal(values.astype(case.library.dtype), case.library)
    assert golden_cases.values_sha256(values) == case.sha256


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("compressed_tensors"))
def test_compressed_tensors(tmp_path, case):
    weights = case.config["config_groups"]["group_0"]["weights"]
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    check_integers(case, stored, weights["num_bits"])
    assert stored.spec.zero == ("none" if weights["symmetric"] else "point")
    assert stored.spec.block == (1, weights.get("group_size") or 0)
    assert stored.spec.kind == ("int4" if weights["num_bits"] <= 4 else "int8")


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("compressed_tensors"))
def test_compressed_tensors_without_a_configuration(tmp_path, case):
    bits = case.config["config_groups"]["group_0"]["weights"]["num_bits"]
    check_integers(case, golden_cases.read_weight(tmp_path, case.tensors), bits)


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("compressed_tensors_actorder"))
def test_activation_order_of_compressed_tensors(tmp_path, case):
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    check_integers(case, stored, 4)
    index = case.tensors["weight_g_idx"]
    assert stored.spec.permuted
    assert (np.diff(index[stored.load(None).permutation]) >= 0).all()


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("gptq"))
def test_gptq(tmp_path, case):
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    check_integers(case, stored, case.config["bits"])
    assert stored.spec.permuted == case.config["desc_act"]
    assert stored.spec.zero == ("none" if case.config["sym"] else "point")


def test_gptq_zeros_wrap_only_as_their_writer_made_them(tmp_path):
    case = golden_cases.get_case("gptq", "v1-asym-wraps")
    assert (case.zeros == 0).any()
    other = golden_cases.read_weight(
        tmp_path, case.tensors, case.config | {"meta": {"quantizer": ["autogptq:0.7"]}}
    ).load(None)
    stored = case.tensors["qzeros"].view(np.uint32)[:, 0]
    nibbles = np.stack([stored >> (4 * i) & 15 for i in range(8)], -1)
    np.testing.assert_array_equal(other.zeros, (nibbles + 1).T)
    assert other.zeros.max() == 16


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("autoround"))
def test_autoround(tmp_path, case):
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    check_integers(case, stored, case.config["bits"])
    if case.name in ("gptq-sixteen", "gptq-int8-256"):
        assert (stored.load(None).zeros == 1 << case.config["bits"]).all()


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("awq"))
def test_awq(tmp_path, case):
    check_integers(case, golden_cases.read_weight(tmp_path, case.tensors, case.config), 4)


FP8_BLOCKS = {
    "block": ((8, 16), "float32"),
    "channel": ((1, 0), "bfloat16"),
    "channel-float32": ((1, 0), "float32"),
    "inverse": ((8, 16), "float32"),
    "inverse-128-columns": ((128, 128), "bfloat16"),
    "inverse-128-rows": ((128, 128), "float32"),
    "inverse-e8m0": ((8, 16), "e8m0"),
    "tensor": ((0, 0), "float32"),
    "tensor-scalar": ((0, 0), "bfloat16"),
}


@pytest.mark.parametrize("case", **golden_cases.parametrize_cases("fp8"))
def test_fp8(tmp_path, case):
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    tensor, (block, scale) = stored.load(None), FP8_BLOCKS[case.name]
    assert stored.spec == tensor.spec == QuantSpec(kind="fp8", block=block, scale=scale)
    np.testing.assert_array_equal(tensor.codes, case.tensors["weight"].view(np.uint8))
    file_scales = case.tensors.get("weight_scale", case.tensors.get("weight_scale_inv"))
    np.testing.assert_array_equal(
        golden_cases.bit_patterns(tensor.scales).ravel(), golden_cases.bit_patterns(file_scales).ravel()
    )
    check_values(case, tensor)


def test_fp4_of_compressed_tensors(tmp_path):
    case = golden_cases.get_case("fp4", "nvfp4")
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    assert stored.spec == QuantSpec(kind="fp4", block=(1, 16), scale="e4m3", outer="divide")
    assert stored.tensor_names == tuple(
        f"{golden_cases.MODULE_NAME}.weight_{part}" for part in ("global_scale", "packed", "scale")
    )
    tensor = stored.load(None)
    np.testing.assert_array_equal(tensor.codes, case.tensors["weight_packed"])
    assert tensor.outer.shape == ()
    check_values(case, tensor)


def test_fp4_of_modelopt(tmp_path):
    case = golden_cases.get_case("fp4", "modelopt")
    config = dict(case.config)
    exported = config.pop("hf_quant_config")
    expected = QuantSpec(kind="fp4", block=(1, 16), scale="e4m3", outer="multiply")
    for i, (section, file) in enumerate(
        [(config, exported), (None, exported), (config | {"quant_method": "modelopt"}, None)]
    ):
        stored = golden_cases.read_weight(tmp_path / str(i), case.tensors, section, file)
        assert stored.spec == expected
        check_values(case, stored.load(None))


def test_mxfp4(tmp_path):
    case = golden_cases.get_case("fp4", "mxfp4")
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    assert stored.spec == QuantSpec(kind="fp4", block=(1, 32), scale="e8m0")
    check_values(case, stored.load(None))


MLX = [case for case in golden_cases.load_cases("mlx") if case.config["mode"] == "affine"]


@pytest.mark.parametrize("case", MLX, ids=[case.name for case in MLX])
def test_mlx(tmp_path, case):
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    bits, tensor = case.config["bits"], stored.load(None)
    assert stored.spec.block == (1, case.config["group_size"])
    assert (stored.spec.kind, stored.spec.zero) == ("int4" if bits <= 4 else "int8", "bias")
    np.testing.assert_array_equal(unsigned(tensor, bits), case.codes)
    for part, array in (("scales", tensor.scales), ("biases", tensor.zeros)):
        assert array.dtype == case.tensors[part].dtype
        np.testing.assert_array_equal(golden_cases.bit_patterns(array), golden_cases.bit_patterns(case.tensors[part]))
    assert golden_cases.values_sha256(dequantize(tensor)) == case.sha256


MLX_FLOATS = {"mxfp4": ("fp4", 32, "e8m0"), "mxfp8": ("fp8", 32, "e8m0"), "nvfp4": ("fp4", 16, "e4m3")}


@pytest.mark.parametrize(("mode", "spec"), MLX_FLOATS.items())
def test_small_floats_of_mlx(tmp_path, mode, spec):
    case = golden_cases.get_case("mlx", mode)
    stored = golden_cases.read_weight(tmp_path, case.tensors, case.config)
    kind, group, scale = spec
    assert stored.spec == QuantSpec(kind=kind, block=(1, group), scale=scale)
    check_values(case, stored.load(None))


STACKED = [
    *(("mlx", case.name) for case in golden_cases.load_cases("mlx")),
    ("compressed_tensors", "sym-g32"),
    ("compressed_tensors", "asym-channel"),
    ("compressed_tensors", "int6-asym-g32"),
    ("fp8", "channel"),
    ("fp8", "block"),
    ("fp4", "mxfp4"),
    ("fp4", "nvfp4"),
    ("fp4", "modelopt"),
]


@pytest.mark.parametrize(("file", "name"), STACKED)
def test_one_row_of_a_stack(tmp_path, file, name):
    case = golden_cases.get_case(file, name)
    parts = golden_cases.stacked_tensors(case)
    if "weight_shape" in parts:
        parts["weight_shape"] = np.array([3, *case.shape])
    stored = golden_cases.read_weight(tmp_path, parts, case.config)
    whole = stored.load(None)
    assert stored.shape == whole.shape == (3, *case.shape)
    for row in range(3):
        one = stored.load(row)
        assert one.shape == case.shape
        assert one.spec == whole.spec == stored.spec
        assert set(one.components()) == set(whole.components())
        for component, array in one.components().items():
            assert array.dtype == getattr(whole, component).dtype
            np.testing.assert_array_equal(array, getattr(whole, component)[row])
    assert golden_cases.values_sha256(dequantize(stored.load(0))) == case.sha256


def test_single_matrices_have_no_rows_to_load(tmp_path):
    case = golden_cases.get_case("compressed_tensors", "sym-g32")
    with pytest.raises(IndexError, match="has no stack axis"):
        golden_cases.read_weight(tmp_path, case.tensors, case.config).load(0)


def test_plain_tensors_come_as_they_are(tmp_path):
    tensors = {
        "model.norm.weight": np.arange(4, dtype=ml_dtypes.bfloat16),
        "model.layers.1.mlp.gate.e_score_correction_bias": np.arange(3, dtype=np.float32),
        "model.layers.1.mlp.experts.gate_up_proj": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "model.layers.1.self_attn.k_proj.k_scale": np.ones(1, np.float32),
    }
    case = golden_cases.get_case("compressed_tensors", "sym-g32")
    tensors |= {f"{golden_cases.MODULE_NAME}.{part}": array for part, array in case.tensors.items()}
    found = golden_cases.read_weights(tmp_path, tensors, case.config)
    assert set(found) == {
        *(name for name in tensors if golden_cases.MODULE_NAME not in name and "k_scale" not in name)
    } | {f"{golden_cases.MODULE_NAME}.weight"}
    stored = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert (stored.spec, stored.dtype, stored.shape) == (None, np.float32, (2, 2, 3))
    assert not stored.load(None).flags.owndata
    np.testing.assert_array_equal(stored.load(1), tensors[stored.name][1])
    assert found["model.norm.weight"].dtype == ml_dtypes.bfloat16
