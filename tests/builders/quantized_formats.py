"""Writers of every quantized format, from the formats' descriptions and on their own, so that they check the readers.

Each takes a float32 matrix ``[O, I]`` and gives the tensors of its module and the values that these stand for.
`tests/checkpoint/formats/test_format_builders.py` compares them with what the formats' own libraries wrote.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Parts = dict[str, Array]

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class PackedModule:
    """The tensors of one module, and its values in float32."""

    tensors: Parts
    values: Array


@dataclass(frozen=True)
class QuantFormat:
    """A way to store matrices.

    Attributes:
        name: of a test.
        pack: a matrix and a seed to its module.
        config: what config.json says of it.
        key: under which it says so.
    """

    name: str
    pack: Callable[[Array, int], PackedModule]
    config: Mapping[str, Any]
    key: str = "quantization_config"


@dataclass(frozen=True)
class QuantizedIntegers:
    """Codes u8 [O, I] and, for each group of columns, zero points and scales [O, G]; `index` is of each column."""

    qvalues: Array
    zero_points: Array
    scales: Array
    group_index: Array

    @property
    def values(self) -> Array:
        zeros, scales = (part.astype(np.float32)[:, self.group_index] for part in (self.zero_points, self.scales))
        return (self.qvalues.astype(np.float32) - zeros) * scales


def quantize_integers(
    weight: Array, bits: int, group: int, *, symmetric: bool, dtype: Any = np.float16, seed: int | None = None
) -> QuantizedIntegers:
    """Rounds to nearest; with a seed, columns belong to groups in a random order."""
    inputs = weight.shape[1]
    groups = inputs // (group or inputs)
    index = np.arange(inputs) // (group or inputs)
    if seed is not None:
        index = np.random.default_rng(seed).permutation(index)
    last, blocks = 2**bits - 1, [weight[:, index == g] for g in range(groups)]
    high = np.stack([np.maximum(block.max(1), 0) for block in blocks], 1)
    low = np.stack([np.minimum(block.min(1), 0) for block in blocks], 1)
    if symmetric:
        scales = np.maximum(high, -low) / (last // 2)
        zeros = np.full_like(scales, (last + 1) // 2)
    else:
        scales = (high - low) / last
        zeros = np.clip(np.round(-low / scales), 1, last)
    scales = scales.astype(dtype)
    wide = scales.astype(np.float32)[:, index]
    codes = np.clip(np.round(weight / wide) + zeros[:, index], 0, last).astype(np.uint8)
    return QuantizedIntegers(codes, zeros.astype(np.int16), scales, index.astype(np.int32))


def pack_int32(values: Array, bits: int) -> Array:
    """Values along the last axis in 32-bit words, from the lowest bits on; bits divide 32."""
    per_word = 32 // bits
    padded = np.pad(values.astype(np.uint32), [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_word)])
    grouped = padded.reshape(*padded.shape[:-1], -1, per_word)
    return np.bitwise_or.reduce(grouped << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits)), -1).view(np.int32)


def pack_compressed_tensors(q: QuantizedIntegers, bits: int, *, symmetric: bool, act_order: bool = False) -> Parts:
    parts = {
        "weight_packed": pack_int32(q.qvalues, bits),
        "weight_scale": q.scales,
        "weight_shape": np.array(q.qvalues.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_int32(q.zero_points.T, bits).T
    return parts | ({"weight_g_idx": q.group_index} if act_order else {})


def pack_gptq(q: QuantizedIntegers, bits: int, *, zero_points_minus_one: bool, with_g_idx: bool = True) -> Parts:
    stored = (q.zero_points.T - zero_points_minus_one) & (2**bits - 1)
    parts = {"qweight": pack_int32(q.qvalues, bits).T, "qzeros": pack_int32(stored, bits), "scales": q.scales.T}
    return parts | ({"g_idx": q.group_index} if with_g_idx else {})


def pack_awq(q: QuantizedIntegers) -> Parts:
    def interleaved(values: Array) -> Array:
        return pack_int32(values.reshape(len(values), -1, 8)[..., AWQ_ORDER].reshape(values.shape), 4)

    return {"qweight": interleaved(q.qvalues.T), "qzeros": interleaved(q.zero_points.T), "scales": q.scales.T}


def pack_fp8(weight: Array, block: tuple[int, int] | None, dtype: Any, scale_name: str) -> PackedModule:
    """Scales per output, or of blocks that may be cut off at the edges."""
    rows, columns = block or (1, weight.shape[1])
    grid = [(range(0, size, step), step) for size, step in zip(weight.shape, (rows, columns), strict=True)]
    scales = np.array(
        [[np.abs(weight[i : i + rows, j : j + columns]).max() / 448 for j in grid[1][0]] for i in grid[0][0]]
    ).astype(dtype)
    spread = scales.astype(np.float32).repeat(rows, 0)[: weight.shape[0]].repeat(columns, 1)[:, : weight.shape[1]]
    codes = np.clip(weight / spread, -448, 448).astype(E4M3)
    return PackedModule({"weight": codes, scale_name: scales}, codes.astype(np.float32) * spread)


def pack_fp4_nibbles(codes: Array) -> Array:
    """4-bit codes two to a byte, the even column in the low half."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def quantize_fp4(x: Array) -> Array:
    """The nearest 4-bit floats."""
    magnitude = np.abs(np.abs(x)[..., None] - E2M1_VALUES).argmin(-1)
    return (magnitude + 8 * (x < 0)).astype(np.uint8)


def dequantize_fp4(codes: Array) -> Array:
    return np.where(codes & 8, -1, 1).astype(np.float32) * E2M1_VALUES[codes & 7]


def pack_nvfp4(weight: Array, *, modelopt: bool) -> PackedModule:
    """Groups of 16 with e4m3 scales, and one float32 scale that divides (compressed-tensors) or multiplies."""
    amax = np.abs(weight).reshape(len(weight), -1, 16).max(-1)
    outer = np.float32(amax.max() / (448 * 6)) if modelopt else np.float32(448 * 6 / amax.max())
    local = (amax / 6 / outer if modelopt else amax / 6 * outer).astype(E4M3)
    scales = local.astype(np.float32) * outer if modelopt else local.astype(np.float32) / outer
    spread = scales.repeat(16, 1)
    codes = quantize_fp4(weight / spread)
    names = ("weight", "weight_scale_2") if modelopt else ("weight_packed", "weight_global_scale")
    whole = np.array(outer) if modelopt else np.array([outer])
    extra = {"input_scale" if modelopt else "input_global_scale": np.ones(whole.shape, np.float32)}
    parts = {names[0]: pack_fp4_nibbles(codes), "weight_scale": local, names[1]: whole}
    return PackedModule(parts | extra, dequantize_fp4(codes) * spread)


def pack_mxfp4(weight: Array) -> PackedModule:
    """Groups of 32 with powers of two."""
    amax = np.abs(weight).reshape(len(weight), -1, 32).max(-1)
    exponents = np.ceil(np.log2(amax / 6)).astype(np.int32)
    spread = np.exp2(exponents).astype(np.float32).repeat(32, 1)
    codes = quantize_fp4(weight / spread)
    parts = {"weight_packed": pack_fp4_nibbles(codes), "weight_scale": (exponents + 127).astype(np.uint8)}
    return PackedModule(parts, dequantize_fp4(codes) * spread)


def pack_mlx_matrix(weight: Array, bits: int, group: int) -> PackedModule:
    """A scale and a bias for each group, of any stack of matrices."""
    grouped = weight.reshape(*weight.shape[:-1], -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    scales = ((high - low) / (2**bits - 1)).astype(ml_dtypes.bfloat16)
    biases = low.astype(ml_dtypes.bfloat16)
    s, b = (part.astype(np.float32)[..., None] for part in (scales, biases))
    codes = np.clip(np.round((grouped - b) / s), 0, 2**bits - 1)
    parts = {
        "weight": pack_int32(codes.reshape(weight.shape), bits).view(np.uint32),
        "scales": scales,
        "biases": biases,
    }
    return PackedModule(parts, (codes.astype(np.float32) * s + b).reshape(weight.shape))


def pack_checkpoint(
    tensors: Mapping[str, Array], form: QuantFormat, is_packed: Callable[[str], bool]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """A checkpoint with its chosen matrices packed, and the plain checkpoint with the values that these stand for."""
    packed, plain = {}, {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if is_packed(name):
            module = form.pack(np.asarray(tensor, np.float32), seed)
            # Writers of safetensors take the bytes as they lie.
            parts = {part: np.ascontiguousarray(array) for part, array in module.tensors.items()}
            packed |= {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}
            plain[name] = module.values
        else:
            packed[name] = plain[name] = tensor
    return packed, plain


def is_linear_weight(name: str, kinds: Iterable[str]) -> bool:
    """Whether a tensor is a matrix of one of these kinds: experts, shared, attention, dense, mtp, head."""
    if name == "lm_head.weight":
        return "head" in kinds
    parts = {
        "experts": ".mlp.experts.",
        "shared": ".mlp.shared_experts.",
        "attention": ".self_attn.",
        "dense": ".mlp.",
        "mtp": ".eh_proj.",
    }
    kind = next((kind for kind, part in parts.items() if part in name), None)
    return (kind in kinds and name.endswith("_proj.weight")) or (kind in kinds and "_with_mqa.weight" in name)


def group_scheme(bits: int, symmetric: bool, group: int, **more: Any) -> dict[str, Any]:
    """A section of compressed-tensors for integers in all Linear modules."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy, **more}
    return _quantization_config("pack-quantized", weights)


def _quantization_config(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def _compressed_tensors_format(
    name: str, bits: int, group: int, *, symmetric: bool, act_order: bool = False, dtype: Any = np.float16
) -> QuantFormat:
    def pack(weight: Array, seed: int) -> PackedModule:
        q = quantize_integers(weight, bits, group, symmetric=symmetric, dtype=dtype, seed=seed if act_order else None)
        return PackedModule(pack_compressed_tensors(q, bits, symmetric=symmetric, act_order=act_order), q.values)

    more = {"actorder": "group"} if act_order else {}
    return QuantFormat(name, pack, group_scheme(bits, symmetric, group, **more))


def _gptq_format(name: str, bits: int, *, symmetric: bool, act_order: bool = False, version: int = 1) -> QuantFormat:
    def pack(weight: Array, seed: int) -> PackedModule:
        q = quantize_integers(weight, bits, 32, symmetric=symmetric, seed=seed if act_order else None)
        return PackedModule(pack_gptq(q, bits, zero_points_minus_one=version == 1), q.values)

    form = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": act_order}
    return QuantFormat(name, pack, {**config, "checkpoint_format": form, "meta": {"quantizer": ["gptqmodel:7.7.0"]}})


def _pack_autoround_module(weight: Array, seed: int) -> PackedModule:
    q = quantize_integers(weight, 4, 32, symmetric=True)
    return PackedModule(pack_gptq(q, 4, zero_points_minus_one=True, with_g_idx=False), q.values)


def _pack_awq_module(weight: Array, seed: int) -> PackedModule:
    q = quantize_integers(weight, 4, 32, symmetric=False)
    return PackedModule(pack_awq(q), q.values)


BFLOAT16 = ml_dtypes.bfloat16
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
_AUTOROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
FORMATS = (
    _compressed_tensors_format("compressed-tensors", 4, 32, symmetric=True, dtype=BFLOAT16),
    _compressed_tensors_format("compressed-tensors-asymmetric", 4, 32, symmetric=False, dtype=BFLOAT16),
    _compressed_tensors_format("compressed-tensors-order", 4, 32, symmetric=True, act_order=True),
    _compressed_tensors_format("compressed-tensors-channel", 8, 0, symmetric=True, dtype=np.float32),
    _gptq_format("gptq", 4, symmetric=False),
    _gptq_format("gptq-symmetric", 4, symmetric=True),
    _gptq_format("gptq-order", 4, symmetric=False, act_order=True),
    _gptq_format("gptq-v2", 8, symmetric=False, version=2),
    QuantFormat("autoround", _pack_autoround_module, {**_AUTOROUND, "sym": True, "data_type": "int"}),
    QuantFormat(
        "awq",
        _pack_awq_module,
        {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True},
    ),
    QuantFormat(
        "fp8-channel",
        lambda weight, seed: pack_fp8(weight, None, BFLOAT16, "weight_scale"),
        _quantization_config("float-quantized", _FLOAT8),
    ),
    QuantFormat(
        "fp8-block",
        lambda weight, seed: pack_fp8(weight, (32, 32), np.float32, "weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    QuantFormat(
        "nvfp4",
        lambda weight, seed: pack_nvfp4(weight, modelopt=False),
        _quantization_config("nvfp4-pack-quantized", _FLOAT4 | {"strategy": "tensor_group", "group_size": 16}),
    ),
    QuantFormat(
        "nvfp4-modelopt",
        lambda weight, seed: pack_nvfp4(weight, modelopt=True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    ),
    QuantFormat(
        "mxfp4",
        lambda weight, seed: pack_mxfp4(weight),
        _quantization_config("mxfp4-pack-quantized", _FLOAT4 | {"strategy": "group", "group_size": 32}),
    ),
)
FORMATS_BY_NAME = {form.name: form for form in FORMATS}
MLX_FORMAT = QuantFormat(
    "mlx", lambda weight, seed: pack_mlx_matrix(weight, 4, 32), {"bits": 4, "group_size": 32}, key="quantization"
)


def pack_mlx_checkpoint(
    tensors: Mapping[str, Array], config: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """A checkpoint as mlx-lm converts it: experts stacked, kv_b in two, no prediction layer; and its plain values."""
    heads, nope, rank = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "kv_lora_rank"))
    packed: dict[str, Array] = {}
    plain: dict[str, Array] = {}

    def put(name: str, weight: Array) -> Array:
        module = pack_mlx_matrix(np.asarray(weight, np.float32), 4, 32)
        packed.update({f"{name}.{part}": array for part, array in module.tensors.items()})
        return module.values

    last = f"model.layers.{config['num_hidden_layers']}."
    for name, tensor in tensors.items():
        if name.startswith(last):
            continue
        prefix, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind == "kv_b_proj":
            apart = tensor.reshape(heads, -1, rank)
            keys = put(f"{prefix}.embed_q", apart[:, :nope].swapaxes(1, 2)).swapaxes(1, 2)
            both = np.concatenate([keys, put(f"{prefix}.unembed_out", apart[:, nope:])], 1)
            plain[name] = both.reshape(tensor.shape)
        elif ".experts." in name:
            if prefix.endswith(".0"):
                stem = prefix.removesuffix("experts.0")
                names = [f"{stem}experts.{i}.{kind}.weight" for i in range(config["n_routed_experts"])]
                values = put(f"{stem}switch_mlp.{kind}", np.stack([tensors[each] for each in names]))
                plain |= dict(zip(names, values, strict=True))
        elif is_linear_weight(name, ("shared", "attention", "dense", "head")) or name == "model.embed_tokens.weight":
            plain[name] = put(name.removesuffix(".weight"), tensor)
        else:
            packed[name] = plain[name] = tensor
    return packed, plain
