"""Writers of every quantised format, from the formats' descriptions and on their own, so that they check the readers.

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

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Packed:
    """The tensors of one module, and its values in float32."""

    parts: Parts
    values: Array


@dataclass(frozen=True)
class Format:
    """A way to store matrices.

    Attributes:
        name: of a test.
        pack: a matrix and a seed to its module.
        config: what config.json says of it.
        key: under which it says so.
    """

    name: str
    pack: Callable[[Array, int], Packed]
    config: Mapping[str, Any]
    key: str = "quantization_config"


@dataclass(frozen=True)
class Integers:
    """Codes u8 [O, I] and, for each group of columns, zero points and scales [O, G]; `index` is of each column."""

    codes: Array
    zeros: Array
    scales: Array
    index: Array

    @property
    def values(self) -> Array:
        zeros, scales = (part.astype(np.float32)[:, self.index] for part in (self.zeros, self.scales))
        return (self.codes.astype(np.float32) - zeros) * scales


def integers(
    weight: Array, bits: int, group: int, *, symmetric: bool, dtype: Any = np.float16, seed: int | None = None
) -> Integers:
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
    return Integers(codes, zeros.astype(np.int16), scales, index.astype(np.int32))


def words(values: Array, bits: int) -> Array:
    """Values along the last axis in 32-bit words, from the lowest bits on; bits divide 32."""
    per_word = 32 // bits
    padded = np.pad(values.astype(np.uint32), [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_word)])
    grouped = padded.reshape(*padded.shape[:-1], -1, per_word)
    return np.bitwise_or.reduce(grouped << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits)), -1).view(np.int32)


def compressed_tensors(q: Integers, bits: int, *, symmetric: bool, ordered: bool = False) -> Parts:
    parts = {"weight_packed": words(q.codes, bits), "weight_scale": q.scales, "weight_shape": np.array(q.codes.shape)}
    if not symmetric:
        parts["weight_zero_point"] = words(q.zeros.T, bits).T
    return parts | ({"weight_g_idx": q.index} if ordered else {})


def gptq(q: Integers, bits: int, *, less_one: bool, indexed: bool = True) -> Parts:
    stored = (q.zeros.T - less_one) & (2**bits - 1)
    parts = {"qweight": words(q.codes, bits).T, "qzeros": words(stored, bits), "scales": q.scales.T}
    return parts | ({"g_idx": q.index} if indexed else {})


def awq(q: Integers) -> Parts:
    def interleaved(values: Array) -> Array:
        return words(values.reshape(len(values), -1, 8)[..., AWQ_ORDER].reshape(values.shape), 4)

    return {"qweight": interleaved(q.codes.T), "qzeros": interleaved(q.zeros.T), "scales": q.scales.T}


def fp8(weight: Array, block: tuple[int, int] | None, dtype: Any, part: str) -> Packed:
    """Scales per output, or of blocks that may be cut off at the edges."""
    rows, columns = block or (1, weight.shape[1])
    grid = [(range(0, size, step), step) for size, step in zip(weight.shape, (rows, columns), strict=True)]
    scales = np.array(
        [[np.abs(weight[i : i + rows, j : j + columns]).max() / 448 for j in grid[1][0]] for i in grid[0][0]]
    ).astype(dtype)
    spread = scales.astype(np.float32).repeat(rows, 0)[: weight.shape[0]].repeat(columns, 1)[:, : weight.shape[1]]
    codes = np.clip(weight / spread, -448, 448).astype(E4M3)
    return Packed({"weight": codes, part: scales}, codes.astype(np.float32) * spread)


def nibbles(codes: Array) -> Array:
    """4-bit codes two to a byte, the even column in the low half."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def fp4_codes(x: Array) -> Array:
    """The nearest 4-bit floats."""
    magnitude = np.abs(np.abs(x)[..., None] - E2M1).argmin(-1)
    return (magnitude + 8 * (x < 0)).astype(np.uint8)


def fp4_values(codes: Array) -> Array:
    return np.where(codes & 8, -1, 1).astype(np.float32) * E2M1[codes & 7]


def nvfp4(weight: Array, *, modelopt: bool) -> Packed:
    """Groups of 16 with e4m3 scales, and one float32 scale that divides (compressed-tensors) or multiplies."""
    amax = np.abs(weight).reshape(len(weight), -1, 16).max(-1)
    outer = np.float32(amax.max() / (448 * 6)) if modelopt else np.float32(448 * 6 / amax.max())
    local = (amax / 6 / outer if modelopt else amax / 6 * outer).astype(E4M3)
    scales = local.astype(np.float32) * outer if modelopt else local.astype(np.float32) / outer
    spread = scales.repeat(16, 1)
    codes = fp4_codes(weight / spread)
    names = ("weight", "weight_scale_2") if modelopt else ("weight_packed", "weight_global_scale")
    whole = np.array(outer) if modelopt else np.array([outer])
    extra = {"input_scale" if modelopt else "input_global_scale": np.ones(whole.shape, np.float32)}
    parts = {names[0]: nibbles(codes), "weight_scale": local, names[1]: whole}
    return Packed(parts | extra, fp4_values(codes) * spread)


def mxfp4(weight: Array) -> Packed:
    """Groups of 32 with powers of two."""
    amax = np.abs(weight).reshape(len(weight), -1, 32).max(-1)
    exponents = np.ceil(np.log2(amax / 6)).astype(np.int32)
    spread = np.exp2(exponents).astype(np.float32).repeat(32, 1)
    codes = fp4_codes(weight / spread)
    parts = {"weight_packed": nibbles(codes), "weight_scale": (exponents + 127).astype(np.uint8)}
    return Packed(parts, fp4_values(codes) * spread)


def mlx(weight: Array, bits: int, group: int) -> Packed:
    """A scale and a bias for each group, of any stack of matrices."""
    grouped = weight.reshape(*weight.shape[:-1], -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    scales = ((high - low) / (2**bits - 1)).astype(ml_dtypes.bfloat16)
    biases = low.astype(ml_dtypes.bfloat16)
    s, b = (part.astype(np.float32)[..., None] for part in (scales, biases))
    codes = np.clip(np.round((grouped - b) / s), 0, 2**bits - 1)
    parts = {"weight": words(codes.reshape(weight.shape), bits).view(np.uint32), "scales": scales, "biases": biases}
    return Packed(parts, (codes.astype(np.float32) * s + b).reshape(weight.shape))


def pack_tensors(
    tensors: Mapping[str, Array], form: Format, chosen: Callable[[str], bool]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """A checkpoint with its chosen matrices packed, and the plain checkpoint with the values that these stand for."""
    packed, plain = {}, {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if chosen(name):
            module = form.pack(np.asarray(tensor, np.float32), seed)
            # Writers of safetensors take the bytes as they lie.
            parts = {part: np.ascontiguousarray(array) for part, array in module.parts.items()}
            packed |= {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}
            plain[name] = module.values
        else:
            packed[name] = plain[name] = tensor
    return packed, plain


def linear(name: str, kinds: Iterable[str]) -> bool:
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
    return _section("pack-quantized", weights)


def _section(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def _ct(name: str, bits: int, group: int, *, symmetric: bool, ordered: bool = False, dtype: Any = np.float16) -> Format:
    def pack(weight: Array, seed: int) -> Packed:
        q = integers(weight, bits, group, symmetric=symmetric, dtype=dtype, seed=seed if ordered else None)
        return Packed(compressed_tensors(q, bits, symmetric=symmetric, ordered=ordered), q.values)

    more = {"actorder": "group"} if ordered else {}
    return Format(name, pack, group_scheme(bits, symmetric, group, **more))


def _gptq(name: str, bits: int, *, symmetric: bool, ordered: bool = False, version: int = 1) -> Format:
    def pack(weight: Array, seed: int) -> Packed:
        q = integers(weight, bits, 32, symmetric=symmetric, seed=seed if ordered else None)
        return Packed(gptq(q, bits, less_one=version == 1), q.values)

    form = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": ordered}
    return Format(name, pack, {**config, "checkpoint_format": form, "meta": {"quantizer": ["gptqmodel:7.7.0"]}})


def _autoround(weight: Array, seed: int) -> Packed:
    q = integers(weight, 4, 32, symmetric=True)
    return Packed(gptq(q, 4, less_one=True, indexed=False), q.values)


def _awq(weight: Array, seed: int) -> Packed:
    q = integers(weight, 4, 32, symmetric=False)
    return Packed(awq(q), q.values)


BFLOAT16 = ml_dtypes.bfloat16
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
_AUTOROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
FORMATS = (
    _ct("compressed-tensors", 4, 32, symmetric=True, dtype=BFLOAT16),
    _ct("compressed-tensors-asymmetric", 4, 32, symmetric=False, dtype=BFLOAT16),
    _ct("compressed-tensors-order", 4, 32, symmetric=True, ordered=True),
    _ct("compressed-tensors-channel", 8, 0, symmetric=True, dtype=np.float32),
    _gptq("gptq", 4, symmetric=False),
    _gptq("gptq-symmetric", 4, symmetric=True),
    _gptq("gptq-order", 4, symmetric=False, ordered=True),
    _gptq("gptq-v2", 8, symmetric=False, version=2),
    Format("autoround", _autoround, {**_AUTOROUND, "sym": True, "data_type": "int"}),
    Format("awq", _awq, {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}),
    Format(
        "fp8-channel",
        lambda weight, seed: fp8(weight, None, BFLOAT16, "weight_scale"),
        _section("float-quantized", _FLOAT8),
    ),
    Format(
        "fp8-block",
        lambda weight, seed: fp8(weight, (32, 32), np.float32, "weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    Format(
        "nvfp4",
        lambda weight, seed: nvfp4(weight, modelopt=False),
        _section("nvfp4-pack-quantized", _FLOAT4 | {"strategy": "tensor_group", "group_size": 16}),
    ),
    Format(
        "nvfp4-modelopt",
        lambda weight, seed: nvfp4(weight, modelopt=True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    ),
    Format(
        "mxfp4",
        lambda weight, seed: mxfp4(weight),
        _section("mxfp4-pack-quantized", _FLOAT4 | {"strategy": "group", "group_size": 32}),
    ),
)
BY_NAME = {form.name: form for form in FORMATS}
MLX = Format("mlx", lambda weight, seed: mlx(weight, 4, 32), {"bits": 4, "group_size": 32}, key="quantization")


def pack_mlx(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """A checkpoint as mlx-lm converts it: experts stacked, kv_b in two, no prediction layer; and its plain values."""
    heads, nope, rank = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "kv_lora_rank"))
    packed: dict[str, Array] = {}
    plain: dict[str, Array] = {}

    def put(name: str, weight: Array) -> Array:
        module = mlx(np.asarray(weight, np.float32), 4, 32)
        packed.update({f"{name}.{part}": array for part, array in module.parts.items()})
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
        elif linear(name, ("shared", "attention", "dense", "head")) or name == "model.embed_tokens.weight":
            plain[name] = put(name.removesuffix(".weight"), tensor)
        else:
            packed[name] = plain[name] = tensor
    return packed, plain
