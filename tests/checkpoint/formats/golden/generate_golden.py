"""Generates the golden files: small matrices packed by each format's own library, with the values it reads back.

This is not part of the test run, because the project does not require the libraries. The files were generated with
Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0 and, in one environment,

    compressed-tensors 0.20.0   auto-round 0.16.1   nvidia-modelopt 0.47.0   mlx 0.32.0 with mlx-cpu 0.32.0
    gptqmodel 7.7.0             autoawq 0.2.9

The last two are source distributions: unpack them and put their folders on PYTHONPATH. Packing needs neither a GPU nor
a build. AutoAWQ can no longer be imported as a whole, so only its module of the GEMM layout is loaded.
compressed-tensors 0.20 dropped activation order, so that file alone is generated with version 0.13.0, in an
environment or a folder of its own.

    python tests/checkpoint/formats/golden/generate_golden.py FORMAT ...

FORMAT is one of the names in FORMATS. For each case ``name``, a file holds the tensors ``name/<tensor>`` as the library
writes them, and the numbers that the library unpacks: ``name/=codes`` (unsigned, in the order of the inputs, ``[O,
I]``), ``name/=zeros`` and ``name/=scales`` (``[O, G]``), and ``name/=library``, the library's own dequantized matrix.
The metadata of a case is JSON: the configuration of such a checkpoint, the shape, and the SHA-256 of the float32 values
that the library's numbers give without any rounding in between.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN_FOLDER = Path(__file__).parent
CASES: dict[str, dict[str, object]] = {}


def add_case(name, tensors, config, values, **expected):
    """Adds one case; ``values`` are ``float32 [O, I]``."""
    assert values.dtype is torch.float32
    expected = {key: value for key, value in expected.items() if value is not None}
    digest = hashlib.sha256((values + 0.0).contiguous().numpy().tobytes()).hexdigest()
    CASES[name] = {
        "tensors": {f"{name}/{key}": value.detach().contiguous().clone() for key, value in tensors.items()}
        | {f"{name}/={key}": value.detach().contiguous().clone() for key, value in expected.items()},
        "info": {"config": config, "shape": list(values.shape), "sha256": digest},
    }


def save_cases(file):
    """Writes the added cases to one file and clears them."""
    tensors = {key: value for case in CASES.values() for key, value in case["tensors"].items()}
    metadata = {name: json.dumps(case["info"], sort_keys=True) for name, case in CASES.items()}
    save_file(tensors, GOLDEN_FOLDER / f"{file}.safetensors", metadata)
    CASES.clear()


def random_quantized_matrix(outputs, inputs, group, bits, *, symmetric=False, dtype=torch.float16, zeros=None):
    """Random codes, zero points and scales, and their matrix: ``[O, I]``, ``[O, G]``, ``[O, G]``, ``[O, I]``."""
    groups = inputs // (group or inputs)
    codes = torch.randint(0, 1 << bits, (outputs, inputs))
    if zeros is None:
        zeros = torch.randint(1, 1 << bits, (outputs, groups))
    if symmetric:
        zeros = torch.full((outputs, groups), 1 << (bits - 1))
    scales = (torch.rand(outputs, groups) * 0.02 + 0.001).to(dtype)
    return codes, zeros, scales, dequantize(codes, zeros, scales)


def dequantize(codes, zeros, scales, g_idx=None):
    """Dequantizes as (u - z) s in float32, which is exact for codes of 8 bits and scales of 16 bits."""
    index = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1]) if g_idx is None else g_idx.long()
    return (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]


def linear(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


def compressed_tensors():
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def add(name, outputs, inputs, group, bits, symmetric, dtype):
        offset = 1 << (bits - 1)
        zeros = None if symmetric else torch.randint(0, 1 << bits, (outputs, inputs // (group or inputs)))
        _, zeros, scales, weight = random_quantized_matrix(
            outputs, inputs, group, bits, symmetric=symmetric, dtype=dtype, zeros=zeros
        )
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight, "weight_scale": scales}
        if not symmetric:
            state["weight_zero_point"] = (zeros - offset).to(torch.int8)
        packed = PackedQuantizationCompressor.compress(state, scheme)
        codes = unpack_from_int32(packed["weight_packed"], bits, weight.shape).int() + offset
        if not symmetric:
            unpacked = unpack_from_int32(packed["weight_zero_point"], bits, scales.shape, packed_dim=0)
            zeros = unpacked.int() + offset
        library = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        group_config = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group_config},
        }
        values = dequantize(codes, zeros, scales)
        expected = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": scales}
        add_case(name, packed, config, values, library=library, **expected)

    add("sym-g32", 5, 64, 32, 4, True, torch.bfloat16)
    add("sym-g64", 5, 128, 64, 4, True, torch.float16)
    add("sym-g128", 2, 256, 128, 4, True, torch.float32)
    add("sym-channel", 8, 44, None, 4, True, torch.bfloat16)
    add("asym-g32", 9, 64, 32, 4, False, torch.bfloat16)
    add("asym-g128", 4, 128, 128, 4, False, torch.float16)
    add("asym-channel", 7, 60, None, 4, False, torch.bfloat16)
    add("int8-sym-g32", 4, 64, 32, 8, True, torch.bfloat16)
    add("int8-asym-g64", 6, 64, 64, 8, False, torch.float16)
    add("int8-channel", 8, 36, None, 8, True, torch.float32)
    add("int3-sym-g32", 4, 64, 32, 3, True, torch.bfloat16)
    add("int2-asym-g32", 5, 64, 32, 2, False, torch.bfloat16)
    add("int6-asym-g32", 7, 64, 32, 6, False, torch.bfloat16)
    save_cases("compressed_tensors")


def compressed_tensors_actorder():
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import (
        PackedQuantizationCompressor,
        unpack_from_int32,
    )
    from compressed_tensors.quantization import QuantizationArgs

    for name, symmetric in (("actorder-sym", True), ("actorder-asym", False)):
        codes, zeros, scales, _ = random_quantized_matrix(8, 128, 32, 4, symmetric=symmetric, dtype=torch.bfloat16)
        g_idx = (torch.randperm(128) // 32).to(torch.int32)
        weight = dequantize(codes, zeros, scales, g_idx)
        args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, group_size=32, actorder="group")
        compressor = PackedQuantizationCompressor()
        point = (zeros - 8).to(torch.int8)
        packed = compressor.compress_weight(weight, scales, quantization_args=args, zero_point=point, g_idx=g_idx)
        stored = packed | {"weight_scale": scales, "weight_g_idx": g_idx}
        library = compressor.decompress_weight(stored, args)
        codes = unpack_from_int32(packed["weight_packed"], 4, weight.shape).int() + 8
        if not symmetric:
            zeros = unpack_from_int32(packed["weight_zero_point"], 4, scales.shape, packed_dim=0).int() + 8
        group_config = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group_config}}
        values = dequantize(codes, zeros, scales, g_idx)
        expected = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": scales}
        add_case(name, stored, config | {"format": "pack-quantized"}, values, library=library, **expected)
    save_cases("compressed_tensors_actorder")


def gptq():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
    from gptqmodel.utils.model_dequant import unpack_cols, unpack_rows

    def add(name, version, bits, outputs, inputs, group, *, symmetric=False, order=False, zeros=None):
        codes, zeros, scales, weight = random_quantized_matrix(
            outputs, inputs, group, bits, symmetric=symmetric, zeros=zeros
        )
        g_idx = (torch.arange(inputs) // group).to(torch.int32)
        if order:
            g_idx = g_idx[torch.randperm(inputs)]
            weight = dequantize(codes, zeros, scales, g_idx)
        shape = {"in_features": inputs, "out_features": outputs}
        layer = TorchLinear(bits=bits, group_size=group, sym=symmetric, desc_act=order, bias=False, **shape)
        layer.pack_original(linear(weight), scales.float(), zeros.float(), g_idx)
        layer.eval()
        if version == 1:
            settings = types.SimpleNamespace(bits=bits, pack_dtype=torch.int32)
            convert_gptq_v2_to_v1_format_module(layer, settings)
        stored = {key: getattr(layer, key).clone() for key in ("qweight", "qzeros", "scales", "g_idx")}
        if version == 1:
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        library = layer.dequantize_weight().T
        codes = unpack_rows(layer.qweight, bits).T & ((1 << bits) - 1)
        zeros = unpack_cols(layer.qzeros, bits).T & ((1 << bits) - 1)
        scales = layer.scales.T
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": order,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        }
        expected = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": scales}
        add_case(name, stored, config, dequantize(codes, zeros, scales, g_idx), library=library, **expected)

    add("v1-sym", 1, 4, 8, 64, 32, symmetric=True)
    add("v1-asym", 1, 4, 8, 64, 32)
    add("v1-asym-wraps", 1, 4, 8, 64, 32, zeros=torch.arange(16).reshape(8, 2) % 3)
    add("v1-order", 1, 4, 8, 64, 32, symmetric=True, order=True)
    add("v1-asym-order", 1, 4, 8, 64, 16, order=True)
    add("v1-int8", 1, 8, 4, 64, 64, symmetric=True)
    add("v1-int8-asym-wraps", 1, 8, 8, 64, 32, zeros=torch.arange(16).reshape(8, 2) * 17 % 256)
    add("v1-int3", 1, 3, 32, 32, 32, zeros=torch.arange(32).reshape(32, 1) % 8)
    add("v1-int2", 1, 2, 16, 32, 32, symmetric=True)
    add("v2-asym", 2, 4, 16, 32, 32, zeros=torch.arange(16).reshape(16, 1))
    add("v2-order", 2, 4, 8, 64, 32, order=True)
    add("v2-int8", 2, 8, 8, 64, 32, zeros=torch.arange(16).reshape(8, 2) * 17)
    save_cases("gptq")


def autoround():
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM
    from auto_round.utils.bit_packing import awq_reverse_reorder, unpack_bitstream
    from auto_round_extension.torch.qlinear_torch import QuantLinear as Plain
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as LessOne

    def config(packing, bits, group, symmetric):
        method = {"quant_method": "auto-round", "packing_format": packing}
        return method | {"bits": bits, "group_size": group, "sym": symmetric, "data_type": "int"}

    def add(name, kind, packing, bits, inputs, group, *, symmetric=False, words=None, zeros=None):
        _, zeros, scales, weight = random_quantized_matrix(32, inputs, group, bits, symmetric=symmetric, zeros=zeros)
        layer = kind(bits, group, inputs, 32, bias=False)
        layer.device = torch.device("cpu")
        layer.pack(linear(weight), scales.float(), zeros.float(), None, device="cpu")
        if words is not None:
            layer.qzeros.fill_(words)
        codes = unpack_bitstream(layer.qweight, bits, 0).T
        zeros = unpack_bitstream(layer.qzeros, bits, 1).T + (kind is LessOne)
        values = dequantize(codes, zeros, layer.scales.T)
        library = layer(torch.eye(inputs, dtype=torch.float16)).T
        stored = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
        # A zero point of 256 does not fit a byte; of 4 bits, 16 does.
        zeros = zeros.to(torch.uint8 if bits < 8 else torch.int16)
        expected = {"codes": codes.to(torch.uint8), "zeros": zeros, "scales": layer.scales.T}
        library = library if bits == 4 else None  # these files are kept small
        add_case(name, stored, config(packing, bits, group, symmetric), values, library=library, **expected)

    add("gptq-sym", LessOne, "auto_round:auto_gptq", 4, 64, 32, symmetric=True)
    clamped = torch.arange(32).reshape(32, 1) % 16
    add("gptq-asym", LessOne, "auto_round:auto_gptq", 4, 32, 32, zeros=clamped)
    add("gptq-sixteen", LessOne, "auto_round:auto_gptq", 4, 32, 32, words=-1)
    add("gptq-int5", LessOne, "auto_round:auto_gptq", 5, 32, 32)
    add("gptq-int8-256", LessOne, "auto_round:auto_gptq", 8, 32, 32, words=-1)
    add("plain-asym", Plain, "auto_round", 4, 32, 32, zeros=clamped)

    _, zeros, scales, weight = random_quantized_matrix(32, 64, 32, 4)
    layer = WQLinear_GEMM.from_linear(linear(weight), 4, 32, scales=scales.T, zeros=zeros.T.float(), device="cpu")
    codes = awq_reverse_reorder(unpack_bitstream(layer.qweight, 4, 1)).T
    zeros = awq_reverse_reorder(unpack_bitstream(layer.qzeros, 4, 1)).T
    stored = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
    library = layer(torch.eye(64, dtype=torch.float16)).reshape(64, 32).T
    expected = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": layer.scales.T}
    values = dequantize(codes, zeros, layer.scales.T)
    add_case("awq", stored, config("auto_round:auto_awq", 4, 32, False), values, library=library, **expected)
    save_cases("autoround")


def awq():
    # The package imports every model it knows, of versions of transformers that are gone.
    folder = next(Path(entry) / "awq" for entry in sys.path if (Path(entry) / "awq/modules/linear/gemm.py").exists())
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")

    for name, inputs, group in (("g32", 64, 32), ("g128", 128, 128)):
        zeros = torch.arange(32 * (inputs // group)).reshape(32, -1) % 16
        _, zeros, scales, weight = random_quantized_matrix(32, inputs, group, 4, zeros=zeros)
        half = linear(weight.half())
        layer = gemm.WQLinear_GEMM.from_linear(half, 4, group, scales=scales.T, zeros=zeros.T)
        raw = packing.unpack_awq(layer.qweight, layer.qzeros, 4)
        codes, zeros = (part.T & 15 for part in packing.reverse_awq_order(*raw, 4))
        library = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).T
        stored = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
        config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
        expected = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": layer.scales.T}
        values = dequantize(codes, zeros, layer.scales.T)
        add_case(name, stored, config, values, library=library if group == 32 else None, **expected)
    save_cases("awq")


def fp8():
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    def multiplied(codes, scales, rows, columns):
        spread = scales.float().repeat_interleave(rows, 0)[: codes.shape[0]]
        return codes.float() * spread.repeat_interleave(columns, 1)[:, : codes.shape[1]]

    def add(name, weight, strategy, dtype, block=None, scale_shape=None, rename=None):
        args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, block_structure=block)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=None)
        rows, columns = block or (weight.shape[0] if strategy == "tensor" else 1, weight.shape[1])
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        scale = scale.to(dtype).reshape(scale_shape if scale_shape is not None else scale.shape)
        stored = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        library = FloatQuantizationCompressor.decompress(stored, scheme)["weight"]
        values = multiplied(stored["weight"], scale.reshape(-1, scale.shape[-1] if block else 1), rows, columns)
        config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
        config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
        if rename:
            stored[rename] = stored.pop("weight_scale")
            config = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
        add_case(name, stored, config, values, library=library)

    small = torch.randn(8, 48)
    add("channel", small, "channel", torch.bfloat16, scale_shape=(8, 1))
    add("channel-float32", small.bfloat16(), "channel", torch.float32, scale_shape=(8, 1))
    add("tensor", small, "tensor", torch.float32, scale_shape=(1,))
    add("tensor-scalar", small, "tensor", torch.bfloat16, scale_shape=())
    add("block", torch.randn(19, 37), "block", torch.float32, block=[8, 16])
    # Runtimes of DeepSeek's layout allow partial last blocks; its own writer only writes whole blocks.
    whole = {"block": [128, 128], "rename": "weight_scale_inv"}
    add("inverse-128-rows", torch.randn(130, 5), "block", torch.float32, **whole)
    add("inverse-128-columns", torch.randn(3, 130), "block", torch.bfloat16, **whole)

    settings = {"weight_block_size": [8, 16], "scale_fmt": None}
    for name, form in (("inverse", None), ("inverse-e8m0", "ue8m0")):
        quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace(**settings | {"scale_fmt": form}))
        stored = Fp8Quantize(quantizer).convert({"weight": torch.randn(16, 48)})
        library = Fp8Dequantize(quantizer)._dequantize_one(stored["weight"], stored["weight_scale_inv"])
        config = {"quant_method": "fp8", "weight_block_size": [8, 16], "scale_fmt": form}
        add_case(name, stored, config, multiplied(stored["weight"], stored["weight_scale_inv"], 8, 16), library=library)
    save_cases("fp8")


def fp4():
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor, unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = torch.randn(16, 64) * 0.03
    peak = weight.abs().amax()

    def scheme(**settings):
        args = QuantizationArgs(num_bits=4, type="float", symmetric=True, **settings)
        group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        return QuantizationScheme(targets=["Linear"], weights=args), config

    kind, config = scheme(strategy="tensor_group", group_size=16)
    divisor = (448.0 * 6.0 / peak).reshape(1)
    amax = weight.unflatten(1, (-1, 16)).abs().amax(-1)
    scale = (divisor * amax / 6.0).to(torch.float8_e4m3fn).float()
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": divisor}
    stored = NVFP4PackedCompressor.compress(state, kind)
    library = NVFP4PackedCompressor.decompress(stored, kind)["weight"]
    numbers = unpack_fp4_from_uint8(stored["weight_packed"], 16, 64, torch.float32)
    values = numbers * (stored["weight_scale"].float() / divisor).repeat_interleave(16, 1)
    stored["input_global_scale"] = torch.tensor([123.0])
    add_case("nvfp4", stored, config | {"format": "nvfp4-pack-quantized"}, values, library=library)

    kind, config = scheme(strategy="group", group_size=32, scale_dtype="torch.uint8")
    powers = torch.exp2(torch.randint(-9, 3, (16, 2)).float())
    stored = MXFP4PackedCompressor.compress({"weight": torch.randn(16, 64), "weight_scale": powers}, kind)
    library = MXFP4PackedCompressor.decompress(stored, kind)["weight"]
    numbers = unpack_fp4_from_uint8(stored["weight_packed"], 16, 64, torch.float32)
    values = numbers * torch.exp2(stored["weight_scale"].float() - 127).repeat_interleave(32, 1)
    add_case("mxfp4", stored, config | {"format": "mxfp4-pack-quantized"}, values, library=library)

    packed, scale, outer = NVFP4QTensor.quantize(weight.bfloat16(), 16)
    stored = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": outer}
    stored["input_scale"] = torch.tensor(0.25)
    parts = {"scale": scale, "double_scale": outer, "block_sizes": {-1: 16}}
    library = packed.dequantize(torch.float32, **parts)
    numbers = unpack_fp4_from_uint8(stored["weight"], 16, 64, torch.float32)
    values = numbers * (scale.float() * outer).repeat_interleave(16, 1)
    exported = {"producer": {"name": "modelopt", "version": "0.47.0"}}
    exported["quantization"] = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    config = convert_hf_quant_config_format(exported) | {"hf_quant_config": exported}
    add_case("modelopt", stored, config, values, library=library)
    save_cases("fp4")


def mlx():
    import mlx.core as mx
    import numpy as np

    def raw(array):
        return torch.from_numpy(np.array(array))

    def back(array):
        return raw(array.astype(mx.float32))

    def add(name, bits, group, outputs, inputs, dtype):
        kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        weight = mx.array(torch.randn(outputs, inputs).numpy()).astype(getattr(mx, dtype))
        words, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
        ones, nothing = mx.ones(scales.shape), mx.zeros(scales.shape)
        codes = back(mx.dequantize(words, ones, nothing, group_size=group, bits=bits)).to(torch.uint8)
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        library = back(mx.dequantize(words, *wide, group_size=group, bits=bits))
        packed = raw(words)
        scales, biases = back(scales).to(kinds[dtype]), back(biases).to(kinds[dtype])
        spread = [part.float().repeat_interleave(group, 1) for part in (scales, biases)]
        values = codes.float() * spread[0] + spread[1]
        stored = {"weight": packed, "scales": scales, "biases": biases}
        config = {"bits": bits, "group_size": group, "mode": "affine"}
        small = library if bits in (3, 4) else None
        add_case(name, stored, config, values, codes=codes, library=small)

    add("int2-g32", 2, 32, 6, 64, "float16")
    add("int3-g64", 3, 64, 6, 64, "bfloat16")
    add("int4-g32", 4, 32, 6, 96, "bfloat16")
    add("int4-g64", 4, 64, 5, 128, "bfloat16")
    add("int4-g128", 4, 128, 3, 128, "float32")
    add("int5-g64", 5, 64, 3, 128, "bfloat16")
    add("int6-g128", 6, 128, 3, 128, "float16")
    add("int8-g64", 8, 64, 3, 128, "bfloat16")
    for mode, group, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
        weight = mx.array(torch.randn(8, 64).numpy()).astype(mx.bfloat16)
        words, scales = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
        library = back(mx.dequantize(words, scales, group_size=group, bits=bits, mode=mode))
        stored = {"weight": raw(words), "scales": raw(scales)}
        add_case(mode, stored, {"bits": bits, "group_size": group, "mode": mode}, library, library=library)
    save_cases("mlx")


FORMATS = (compressed_tensors, compressed_tensors_actorder, gptq, autoround, awq, fp8, fp4, mlx)

if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        torch.manual_seed(47)
        next(function for function in FORMATS if function.__name__ == wanted)()
